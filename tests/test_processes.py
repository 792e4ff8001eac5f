"""Scripts as the tests run them, forked, do what scripts do that are launched."""

import os
import signal

import pytest

from tests.conftest import TRAINED
from tests.processes import launch_python, run_python, start_python
from tests.runs import assert_same_run

STATE = """
import os, signal, sys, multiprocessing, multiprocessing.util, tempfile, threading
import torch
print(sys.argv, __name__, os.getcwd(), sorted(os.environ.items()), sys.stdin.read())
print([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)])
print(torch.get_num_threads(), torch.is_grad_enabled())
print(multiprocessing.get_start_method(), threading.active_count(), sys.stdout.line_buffering)
print(os.path.dirname(multiprocessing.util.get_temp_dir()) == tempfile.gettempdir())
print(tempfile.gettempdir())
print("to stderr", file=sys.stderr)
"""
ENDS = {
    "by its end": "print('whole')",
    "by an exit code": "import sys; print('whole'); sys.exit(7)",
    "by a sentence": "import sys; sys.exit('why')",
    "by an error": "import atexit; atexit.register(print, 'at exit'); 1 / 0",
    "with a thread": "import threading, time\nthreading.Thread(\n"
    "    target=lambda: (time.sleep(0.2), print('done'))).start()",
    "by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
}


def test_a_forked_training_is_a_launched_one(trained, command, environment, knn_options, tmp_path):
    words = command(tmp_path / "run", f"{TRAINED} {knn_options}")
    done = launch_python(*words, environment=environment)
    assert f"done: {tmp_path}/run\n" in done.stdout
    assert done.stderr == ""
    assert_same_run(tmp_path / "run", trained)


def test_a_forked_process_is_as_a_new_interpreter(environment, tmp_path):
    """Ctrl-C apart, which a launched one ignores where a shell runs the tests in the background."""
    environment = {**environment, "TMPDIR": str(tmp_path)}
    found = [start("-c", STATE, "word", environment=environment) for start in STARTS]
    assert os.listdir(tmp_path) == []
    assert found[0].stdout == found[1].stdout
    assert [done.stderr for done in found] == ["to stderr\n"] * 2


STARTS = (run_python, launch_python)


@pytest.mark.parametrize("way", ENDS)
def test_a_forked_process_ends_as_a_new_interpreter(way, environment):
    found = [start("-c", ENDS[way], environment=environment, code=None) for start in STARTS]
    assert found[0].returncode == found[1].returncode
    assert found[0].stdout == found[1].stdout
    last = [done.stderr.splitlines()[-1:] for done in found]
    assert last[0] == last[1]


DRAW = (
    "import random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(1).item())"
)


def test_draws_without_a_seed_differ_between_forked_processes():
    first, second = (run_python("-c", DRAW).stdout.split() for _ in range(2))
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_a_forked_process_is_signalled_and_waited_for():
    script = start_python("-c", "import time; print('begun', flush=True); time.sleep(1000)")
    script.wait_for("begun")
    assert script.poll() is None
    os.kill(script.pid, 0)
    script.send_signal(signal.SIGTERM)
    assert script.wait() == script.poll() == -signal.SIGTERM
    assert script.said() == "begun\n"
