"""A process of a group dies, throws or does not come: all end, and the first failure is named."""

import errno
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT
from tests.processes import (
    Ended,
    ended_ranks,
    found_by_each,
    free_port,
    launch_python,
    start_group,
)
from utils import distributed
from utils.distributed import World
from utils.errors import InputError, run_script
from utils.files import make_folder
from utils.signals import Preempted, StopSignals

COLLECTIVES = {
    "all_reduce": lambda: distributed.total(torch.ones(1000)),
    "all_reduce async": lambda: dist.all_reduce(torch.ones(4), async_op=True).wait(),
    "ring": lambda: distributed.gather_rows([torch.ones(1000)]),
    "all_to_all": lambda: distributed.permuted(torch.ones(2, 9), torch.arange(6).flip(0)),
    "all_gather_object": lambda: distributed.gather_objects("some text"),
}
TIMEOUT = 0.05  # minutes, of a group one of whose processes does not come


def steps(
    how: str, victim: int = 0, collective: str = "all_reduce", reports: Path | None = None
) -> None:
    """A group that meets at each of 20 steps; at one in the middle something happens.

    reports: where a launcher would look for what its processes say of their failures.
    """
    if reports:
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(reports / f"{os.environ['RANK']}.json")
    world = distributed.start("cpu", TIMEOUT if how in ("sleeps", "never comes") else 1)
    with StopSignals() as signals:
        signals.defer()
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
    if how == "dies and the others get SIGTERM" and not is_victim:
        os.kill(os.getpid(), signal.SIGTERM)
    if not is_victim:
        return
    if how.startswith("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "throws":
        raise ValueError("a bug")
    if how == "refuses":
        raise InputError("the file x is broken")
    if how == "lacks memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")
    if how == "sleeps":
        time.sleep(2 * 60 * TIMEOUT)


def others_end(ended: list[Ended], victim: int) -> None:
    """All but the victim ended with 1 and one line each: it is another process that failed."""
    for rank, end in enumerate(ended):
        if rank != victim:
            assert end.code == 1, ended
            (line,) = [line for line in end.said if not line.startswith("[")]
            assert line.startswith(f"error: rank {rank}: another process has ended, or did not")


def reported(folder: Path) -> dict[int, str]:
    """What each rank would have a launcher report of its failure."""
    files = {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {rank: file["message"]["extraInfo"]["py_callstack"] for rank, file in files.items()}


@pytest.mark.parametrize(
    ("size", "victim", "collective"),
    [
        (2, 1, "all_reduce"),
        (2, 0, "all_gather_object"),
        (3, 2, "all_reduce async"),
        (3, 0, "ring"),
        (3, 1, "all_to_all"),
    ],
)
def test_all_end_in_seconds_when_one_is_killed(size, victim, collective, tmp_path):
    ended = ended_ranks(size, steps, "dies", victim, collective, tmp_path)
    assert ended[victim].code == -signal.SIGKILL
    others_end(ended, victim)
    assert max(end.seconds for end in ended) - ended[victim].seconds < 8
    # What follows from the first failure is no failure of its own: a launcher would take the
    # earliest report for the cause.
    assert reported(tmp_path) == {}
    # A launcher meets the first one before the others have ended.
    others = [end.seconds for rank, end in enumerate(ended) if rank != victim]
    assert min(others) - ended[victim].seconds > 0.5


@pytest.mark.parametrize("victim", [0, 2])
def test_a_bug_of_one_is_told_by_it_alone_and_reported(victim, tmp_path):
    ended = ended_ranks(3, steps, "throws", victim, "all_reduce", tmp_path)
    others_end(ended, victim)
    assert ended[victim].code == 1
    assert ended[victim].said[0].startswith("Traceback")
    assert ended[victim].said[-1] == "ValueError: a bug"
    (told,) = reported(tmp_path).items()
    assert told[0] == victim
    assert told[1].startswith("Traceback")
    assert told[1].endswith("ValueError: a bug\n")


def test_bad_input_of_one_is_a_line_that_a_launcher_reports(tmp_path):
    ended = ended_ranks(2, steps, "refuses", 1, "all_reduce", tmp_path)
    others_end(ended, 1)
    assert (ended[1].code, ended[1].said) == (2, [])
    assert reported(tmp_path) == {1: "utils.errors.InputError: the file x is broken\n"}


def test_a_gpu_without_room_is_one_sentence_with_what_to_lower():
    ended = ended_ranks(2, steps, "lacks memory", 0)
    others_end(ended, 0)
    assert ended[0].code == 1
    (line,) = ended[0].said
    assert "lower --batch_size_per_gpu; pretraining can raise --accum_steps" in line
    assert (
        "TRAIN.CHECKPOINTING true (OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB)"
        in line
    )


@pytest.mark.parametrize(
    ("how", "launcher", "code", "said"),
    [
        ("nothing", False, 0, []),
        ("all refuse", True, 2, ["error: no image is there"]),
        ("all are preempted", False, 75, ["preempted: stopped; all is saved"]),
    ],
)
def test_what_happens_to_all_is_said_once(how, launcher, code, said, tmp_path):
    ended = ended_ranks(3, steps, how, 0, "all_reduce", tmp_path if launcher else None)
    assert [(end.code, end.said) for end in ended] == [(code, said), (code, []), (code, [])]


def test_what_one_refuses_is_said_where_no_launcher_reports_it():
    """Whether the others refuse it too, a process cannot know: each says it."""
    ended = ended_ranks(2, steps, "refuses", 1)
    others_end(ended, 1)
    assert (ended[1].code, ended[1].said) == (2, ["error: the file x is broken"])


def failures_of_main(world: World) -> list[tuple[str, str]]:
    """What a process meets where the first one's work is refused, and where it breaks."""
    folder, found = Path(f"/dev/null/{world.rank}"), []
    for make in (make_folder, os.mkdir):
        try:
            distributed.on_main(lambda make=make: make(folder))
        except (InputError, OSError, dist.DistError) as error:
            found.append((type(error).__name__, str(error)))
    return found


def test_what_the_first_refuses_for_all_is_raised_in_all_and_what_breaks_there_too():
    first, second = found_by_each(2, failures_of_main)
    assert first[0] == second[0]
    assert first[0][1].startswith("--output_dir /dev/null/0 cannot be written")
    assert first[1][0] == "NotADirectoryError"
    reason = "on rank 0 NotADirectoryError(20, 'Not a directory')"
    assert second[1] == ("DistError", reason)


def test_who_is_stopped_because_another_died_does_not_claim_to_be_preempted():
    """A launcher sends SIGTERM to the others of a process that died."""
    others_end(ended_ranks(3, steps, "dies and the others get SIGTERM", 1), 1)


def test_all_end_after_the_timeout_when_one_does_not_come():
    ended = ended_ranks(3, steps, "sleeps", 1)
    others_end(ended, 1)
    assert ended[1].code == 1
    assert ended[1].seconds - ended[0].seconds < 60 * TIMEOUT + 2


def test_a_group_that_never_stands_is_one_sentence():
    (end,) = ended_ranks(2, steps, "never comes", absent=1)
    assert end.code == 1
    (line,) = [line for line in end.said if line.startswith("error")]
    assert "the processes did not all come together at 127.0.0.1:" in line


def test_alone_a_bug_keeps_its_traceback():
    def bug():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(bug)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: ...\n"
                "RuntimeError: unable to allocate shared memory(shm) for file </torch_9_1_2>: No "
                "space left on device (28)\n"
            ),
            "make it larger (docker run --shm-size), or lower --num_workers",
        ),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "raise the limit (ulimit -n)"),
        (RuntimeError("received 0 items of ancdata"), "raise the limit (ulimit -n)"),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."),
            "a loader process was killed",
        ),
    ],
)
def test_what_loader_processes_lack_is_a_line(error, advice, capfd):
    def fails():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(fails)
    assert caught.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert advice in line
    assert "--num_workers" in line
    assert "Traceback" not in line


def test_a_pretraining_ends_when_one_of_its_processes_is_killed(command, environment, tmp_path):
    """With loader workers, which hold the killed process's connections open for a while."""
    options = "TRAIN.BATCH_SIZE_PER_GPU 4 PRINT_FREQ 1 TRAIN.EPOCHS 5000 DATA.WORKERS 1"
    words = command(tmp_path / "run", options)
    processes = start_group(2, *words, environment=environment)
    try:
        processes[0].wait_for("step 3/")
        processes[0].kill()
        assert processes[1].wait() == 1
    finally:
        for process in processes:
            process.kill()
    (line,) = [line for line in processes[1].said().splitlines() if "error" in line]
    assert line.startswith("error: rank 1: another process has ended")


# Under launchers

GROUP = """
import os, signal, torch
from utils import distributed
from utils.errors import run_script
def main():
    rank = distributed.start("cpu", 1).rank
    for step in range(5):
        distributed.total(torch.ones(1))
        if (rank, step) == (1, 3):
            print("killed:", os.getpid())
            os.kill(os.getpid(), signal.SIGKILL)
run_script(main)
"""


@pytest.mark.parametrize(
    ("launcher", "size"),
    [
        ("torch.distributed.run", 2),
        # The same launcher by its old name.
        pytest.param("torch.distributed.launch", 3, marks=pytest.mark.slow),
    ],
)
def test_a_launcher_names_the_killed_process(launcher, size, environment, tmp_path):
    (tmp_path / "group.py").write_text(GROUP)
    words = ["-m", launcher, f"--nproc_per_node={size}", f"--master_port={free_port()}"]
    place = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = launch_python(*words, tmp_path / "group.py", environment=environment | place, code=1)
    killed = done.stdout.split("killed: ")[1].split()[0]
    cause = done.stderr.split("Root Cause (first observed failure):")[1]
    assert "rank      : 1 " in cause
    assert f"exitcode  : -9 (pid: {killed})  (SIGKILL)" in cause


def test_a_port_that_another_run_has_taken_is_said(monkeypatch):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        places = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in places.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(torch.distributed.DistError, match="failed to listen"):
            distributed.start("cpu")


def waits_for_another(number: int) -> None:
    """A process that gets a signal while it waits for one that never comes."""
    distributed.PATIENCE = 0.1
    # A shell's background jobs are started deaf to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
    with StopSignals():
        distributed.start("cpu", 2)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 1), (signal.SIGUSR1, 75)]
)
def test_a_process_that_waits_for_others_heeds_signals(number, code):
    (end,) = ended_ranks(2, waits_for_another, number, absent=1)
    assert end.code == code
    assert end.said[0].startswith("rank 0 of 2 waits for the others at 127.0.0.1:")
    assert end.seconds < 20
    how = {signal.SIGINT: "interrupted: "}.get(number, f"stopped by {number.name} before the first")
    assert how in end.said[-1]
