"""A process of a group dies, throws or does not come: the others end, and name it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT
from tests.processes import Ended, ended_ranks, free_port, start_group, workers_of
from utils import distributed, failure
from utils.errors import InputError, run_script
from utils.signals import Preempted

COLLECTIVES = {
    "all_reduce": lambda: distributed.total(torch.ones(1000)),
    "all_reduce async": lambda: dist.all_reduce(torch.ones(4), async_op=True).wait(),
    "all_gather": lambda: distributed.gather(torch.ones(10)),
    "all_gather_object": lambda: distributed.gather_objects("some text"),
    "barrier": dist.barrier,
}


def steps(how: str, victim: int = 0, collective: str = "all_reduce") -> None:
    """A group that meets at each of 20 steps; at one in the middle something happens."""
    world = distributed.start("cpu", 0.05 if how in ("sleeps", "never comes") else 1)
    for step in range(20):
        COLLECTIVES[collective]()
        if step == 10:
            happens(how, world.rank == victim)
    distributed.stop()


def happens(how: str, is_victim: bool) -> None:
    if how == "all refuse":
        raise InputError("no image is there")
    if how == "all are preempted":
        raise Preempted("stopped; all is saved")
    if how == "preempted beside a death":
        if is_victim:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Preempted("stopped; all is saved")
    if how == "dies while others work":
        failure._GRACE = 1.0
        if is_victim:
            # A loader worker holds copies of all of its parent's open files.
            if os.fork() == 0:
                time.sleep(20)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(40)
    if is_victim and how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if is_victim and how == "throws":
        raise ValueError("a bug")
    if is_victim and how == "refuses":
        raise InputError("the file x is broken", everywhere=False)
    if is_victim and how == "refuses as if with all":
        raise InputError("the file x is broken")
    if is_victim and how == "lacks memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")
    if is_victim and how == "sleeps":
        failure._GRACE = 1.0
        time.sleep(40)


def others_named(ended: list[Ended], victim: int, words: str) -> None:
    """All but the victim ended with 1, and one of them said one line, on the victim."""
    others = [end for rank, end in enumerate(ended) if rank != victim]
    assert [end.code for end in others] == [1] * len(others), ended
    (line,) = [line for end in others for line in end.said if not line.startswith("[")]
    assert line.startswith(f"error: rank {victim} ("), line
    assert words in line


@pytest.mark.parametrize(
    ("size", "victim", "collective"),
    [
        (2, 1, "all_reduce"),
        (2, 0, "all_gather_object"),
        (3, 2, "all_reduce async"),
        (3, 0, "all_gather"),
        (3, 1, "barrier"),
    ],
)
def test_all_end_in_seconds_when_one_is_killed_and_name_it(size, victim, collective):
    ended = ended_ranks(size, steps, "dies", victim, collective)
    assert ended[victim].code == -signal.SIGKILL
    others_named(ended, victim, "died first, without a word: it was killed")
    assert max(end.seconds for end in ended) - ended[victim].seconds < 8


@pytest.mark.parametrize("victim", [0, 2])
def test_a_bug_of_one_is_told_by_it_in_full_and_by_another_in_a_line(victim):
    ended = ended_ranks(3, steps, "throws", victim)
    others_named(ended, victim, "failed first: ValueError: a bug")
    assert ended[victim].code == 1
    assert ended[victim].said[0].startswith("Traceback")
    assert ended[victim].said[-1] == "ValueError: a bug"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("refuses", "failed first: the file x is broken"),
        ("refuses as if with all", "left first, without the others: the file x is broken"),
    ],
)
def test_bad_input_of_one_is_told_by_the_others_too(how, words):
    ended = ended_ranks(2, steps, how, 1)
    others_named(ended, 1, words)
    assert ended[1].code == 2
    # Of what all are to refuse the first of a machine tells; here it told whose refusal it was.
    assert ended[1].said == (["error: the file x is broken"] if how == "refuses" else [])


def test_a_gpu_without_room_is_one_sentence_with_what_to_lower():
    ended = ended_ranks(2, steps, "lacks memory", 0)
    others_named(ended, 0, "failed first: the GPU's memory is too small")
    (line,) = ended[0].said
    assert "lower TRAIN.BATCH_SIZE_PER_GPU and raise TRAIN.ACCUM_STEPS" in line
    assert "TRAIN.CHECKPOINTING true (CUDA out of memory. Tried to allocate 2 GiB)" in line


def test_what_all_refuse_is_said_once_and_nobody_is_first():
    ended = ended_ranks(3, steps, "all refuse")
    assert [end.code for end in ended] == [2, 2, 2]
    assert [end.said for end in ended] == [["error: no image is there"], [], []]


def test_all_are_preempted_together_with_75_and_one_line():
    ended = ended_ranks(3, steps, "all are preempted")
    assert [end.code for end in ended] == [75, 75, 75]
    assert [end.said for end in ended] == [["preempted: stopped; all is saved"], [], []]


def test_who_is_stopped_because_another_died_does_not_claim_to_be_preempted():
    others_named(ended_ranks(3, steps, "preempted beside a death", 1), 1, "died first")


def test_a_death_is_told_to_those_who_are_in_no_collective():
    """As with nccl, whose collectives wait on; a child of the dead keeps its sockets open."""
    ended = ended_ranks(2, steps, "dies while others work", 1)
    others_named(ended, 1, "died first")
    assert ended[0].seconds - ended[1].seconds < 8


def test_one_that_does_not_come_is_named_with_its_place_after_the_timeout():
    ended = ended_ranks(3, steps, "sleeps", 1)
    others_named(ended, 1, "did not come to where the others waited: it is in test_failure.py:")
    assert "happens()" in "".join(ended[0].said)
    assert ended[1].code == 1


def test_a_group_that_never_stands_is_one_sentence():
    (end,) = ended_ranks(2, steps, "never comes", absent=1)
    assert end.code == 1
    (line,) = [line for line in end.said if line.startswith("error")]
    assert "the processes did not all come together at 127.0.0.1:" in line


def test_a_group_that_ends_well_says_nothing():
    ended = ended_ranks(3, steps, "nothing")
    assert [(end.code, end.said) for end in ended] == [(0, [])] * 3


def test_alone_a_bug_keeps_its_traceback_and_too_little_memory_is_a_line(capfd):
    def bug():
        raise ValueError("a bug")

    def too_little():
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")

    with pytest.raises(ValueError, match="a bug"):
        run_script(bug)
    with pytest.raises(SystemExit) as caught:
        run_script(too_little)
    assert caught.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "a loader process was killed" in line
    assert "DATA.WORKERS" in line


# main_cmd.py itself

LONG = "TRAIN.BATCH_SIZE_PER_GPU 4 PRINT_FREQ 1 SEED 3"


def wait_for(path: Path, words: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while words not in path.read_text():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_pretraining_ends_when_one_of_its_processes_is_killed(
    victim, command, environment, tmp_path
):
    """Started by hand, with loader workers, which outlive the killed process for a while."""
    words = command(tmp_path / "run", f"{LONG} TRAIN.EPOCHS 5000 DATA.WORKERS 1")
    processes = start_group(2, *words, environment=environment)
    try:
        processes[0].wait_for("step 3/")
        processes[victim].kill()
        assert processes[1 - victim].wait(timeout=25) == 1
    finally:
        for process in processes:
            process.kill()
    (line,) = [li for li in processes[1 - victim].said().splitlines() if "error" in li]
    assert line.startswith(f"error: rank {victim} (")
    assert f"process {processes[victim].pid}) died first" in line


@pytest.mark.slow
def test_torchrun_starts_a_killed_worker_again_and_the_run_is_complete(
    command, environment, tmp_path
):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3"]
    launcher.append(f"--master_port={free_port()}")
    words = command(
        tmp_path / "run", f"{LONG} TRAIN.EPOCHS 30 CKPT.EVERY_MINUTES 0", launcher=launcher
    )
    path = tmp_path / "said.txt"
    with path.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    try:
        wait_for(path, "step 4/", process)
        killed = workers_of(process)[1]
        os.kill(killed, signal.SIGKILL)
        assert process.wait(timeout=120) == 0, path.read_text()
    finally:
        process.terminate()
        process.wait()
    said = path.read_text()
    assert f"process {killed}) died first" in said
    assert "resuming from" in said
    assert "step 60/60" in said
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert state["step"] == 60


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "MASTER_ADDR is not set: start the processes by torchrun"),
        ({"RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK 3 of WORLD_SIZE 2"),
        ({"RANK": "one"}, "RANK is 'one', not a whole number"),
        (
            {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
            "MASTER_PORT is 'http', not a whole number",
        ),
    ],
)
def test_wrong_variables_of_a_launcher_are_one_sentence(variables, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        distributed.start("cpu")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 1), (signal.SIGUSR1, 75)]
)
def test_a_process_that_waits_for_others_heeds_signals(number, code, environment):
    script = (
        "import signal\nfrom utils import distributed, signals\nsignals.PATIENCE = 0.1\n"
        # A shell's background jobs are started deaf to it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with signals.StopSignals():\n    distributed.start('cpu', 2)"
    )
    port = str(free_port())
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment | group,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline() == f"rank 0 of 2 waits for the others at 127.0.0.1:{port}\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert f"stopped by {number.name} before the first step: nothing was lost" in said
