"""Who started a process: torchrun, srun or nobody; one run at a time in a folder."""

import signal

import pytest
import torch

from tests.processes import free_port, start_python
from utils import distributed, launch, lock
from utils.errors import InputError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOB = "SLURM_JOB_ID=7 SLURM_JOB_NODELIST=gpu[03-04]"
STEP = f"{JOB} SLURM_STEP_ID=2 SLURM_STEP_NUM_TASKS=4 SLURM_STEP_TASKS_PER_NODE=2(x2)"


@pytest.fixture
def given(monkeypatch):
    """Set exactly these of the launchers' variables, as "NAME=VALUE ..."."""

    def give(text: str) -> None:
        for name in {*launch.os.environ, *NAMES}:
            if name in NAMES or name.startswith("SLURM_"):
                monkeypatch.setenv(name, "")  # so that it is restored, whoever sets it
                monkeypatch.delenv(name)
        for word in text.split():
            monkeypatch.setenv(*word.split("=", 1))

    return give


@pytest.mark.parametrize(
    ("variables", "place", "meets"),
    [
        ("", (0, 1, 0), None),
        ("RANK=0 LOCAL_RANK=0", (0, 1, 0), None),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=2", (0, 1, 2), None),
        # srun's tasks; a step is smaller than its job.
        (
            f"{STEP} SLURM_NTASKS=8 SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NODEID=1",
            (3, 4, 1),
            ("gpu03", "20009", "2"),
        ),
        (
            "SLURM_STEP_NUM_TASKS=2 SLURM_JOB_NODELIST=gpu03 SLURM_PROCID=0 SLURM_LOCALID=0",
            (0, 2, 0),
            ("127.0.0.1", "20000", "2"),
        ),
        (
            f"{STEP} SLURM_PROCID=1 SLURM_LOCALID=1 MASTER_ADDR=head MASTER_PORT=99",
            (1, 4, 1),
            ("head", "99", "2"),
        ),
        (f"{JOB} SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=8 SLURM_PROCID=0", (0, 1, 0), None),
        # As many write it: all but the rank by hand.
        (
            f"{STEP} SLURM_PROCID=1 SLURM_LOCALID=1 WORLD_SIZE=4 MASTER_ADDR=gpu04",
            (1, 4, 1),
            ("gpu04", "20009", "2"),
        ),
        # A batch script's own process, or salloc's shell.
        (f"{JOB} SLURM_NTASKS=8", (0, 1, 0), None),
        (f"{JOB} SLURM_NTASKS=8 SLURM_PROCID=0", (0, 1, 0), None),
        (
            "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2",
            (1, 2, 1),
            ("127.0.0.1", "20000", "2"),
        ),
        # Others win over Slurm, in whose jobs they may run.
        (f"{STEP} SLURM_PROCID=3 RANK=0 WORLD_SIZE=1", (0, 1, 0), None),
    ],
)
def test_a_process_knows_its_place(variables, place, meets, given):
    given(variables)
    assert launch.place() == place
    if meets:
        names = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
        assert tuple(launch.os.environ.get(name) for name in names) == meets
        assert launch.place() == place  # as torchrun would have said it


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ("LOCAL_RANK=1", "but RANK, WORLD_SIZE are not: start the processes by"),
        ("RANK=1", "but WORLD_SIZE, LOCAL_RANK are not"),
        ("RANK=0 WORLD_SIZE=", "WORLD_SIZE is '', not a whole number"),
        ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE is 'two', not a whole number"),
        ("WORLD_SIZE=2 LOCAL_RANK=0", "but RANK, MASTER_ADDR, MASTER_PORT are not: start the"),
        ("WORLD_SIZE=2 RANK=1", "but LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"),
        (
            "WORLD_SIZE=2 RANK=0 LOCAL_RANK=0",
            "MASTER_ADDR, MASTER_PORT are not: start",
        ),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=a", "but MASTER_PORT are not"),
        ("WORLD_SIZE=2 RANK=3 LOCAL_RANK=0", "RANK 3 of WORLD_SIZE 2: ranks go from 0 to 1"),
        ("WORLD_SIZE=2 RANK=one LOCAL_RANK=0", "RANK is 'one', not a whole number"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=http", "PORT is 'http'"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=x", "LOCAL_WORLD_SIZE is 'x'"),
        ("SLURM_PROCID=x SLURM_STEP_NUM_TASKS=2", "SLURM_PROCID is 'x', not a whole number"),
        (f"{STEP} SLURM_PROCID=2", "SLURM_LOCALID is not set"),
        (f"{STEP} SLURM_PROCID=2 WORLD_SIZE=8", "WORLD_SIZE is 8, but 4 processes were started"),
        (
            f"{JOB} SLURM_PROCID=0 SLURM_NTASKS=2 WORLD_SIZE=2",
            "but RANK, LOCAL_RANK, MASTER_ADDR",
        ),
    ],
)
def test_what_a_launcher_leaves_out_is_one_sentence(variables, words, given):
    given(variables)
    with pytest.raises(InputError, match=words):
        launch.place()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu3", "gpu3"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("rack[1-2]node[08,10]", "rack1node08"),
        ("a-1,b[2-3]", "a-1"),
        ("n[7]-ib", "n7-ib"),
    ],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert launch.first_node(nodes) == first


GROUP = """
import os, torch
from utils import distributed
from utils.errors import run_script
def main():
    world = distributed.start("cpu", 1)
    print(world.rank, world.size, int(distributed.total(torch.ones(()))), os.environ.get("RANK"))
    distributed.stop()
run_script(main)
"""


def test_processes_of_srun_are_one_group(environment):
    meeting = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}"
    meeting += " SLURM_PROCID={0} SLURM_STEP_NUM_TASKS=2"
    scripts = [
        start_python(
            *("-c", GROUP),
            environment=environment
            | dict(word.split("=") for word in meeting.format(rank).split()),
        )
        for rank in (0, 1)
    ]
    said = [script.communicate() for script in scripts]
    assert said == [("0 2 2 0\n", ""), ("1 2 2 1\n", "")]


@pytest.mark.parametrize(
    ("seen", "local_rank", "index"), [(1, 0, 0), (1, 3, 0), (4, 3, 3), (4, 4, None), (0, 0, None)]
)
def test_a_process_takes_the_gpu_of_its_number_or_the_only_one(
    seen, local_rank, index, monkeypatch
):
    """With torch's view of the machine replaced: no test machine has four GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    if index is None:
        with pytest.raises(InputError, match="no GPU"):
            distributed.start("cuda")
    else:
        assert distributed.start("cuda").device == torch.device("cuda", index)


# One run at a time


HOLD = """
import pathlib, sys, time
from utils import lock
lock.claim(pathlib.Path(sys.argv[1]), "pretraining")
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_is_one_runs_until_its_process_ends_however(tmp_path, environment, refuse):
    holder = start_python("-c", HOLD, tmp_path, environment=environment)
    try:
        holder.wait_for("held")
        with pytest.raises(InputError, match=f"process {holder.pid} on .* is at the same work in "):
            lock.claim(tmp_path, "pretraining")
        assert f"process {holder.pid} on " in refuse(tmp_path)
        assert not (tmp_path / "config.yaml").exists()
        lock.claim(tmp_path, "probe")  # other work
    finally:
        holder.kill()
    holder.wait()
    lock.claim(tmp_path, "pretraining")
    lock.claim(tmp_path, "pretraining")  # of the same process
    assert holder.returncode == -signal.SIGKILL
