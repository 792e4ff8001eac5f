"""The sbatch file of experiments/slurm, run with stand-ins for srun and scontrol."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import PATIENCE, ROOT, run_group
from tests.runs import load
from utils import launch

SCRIPT = ROOT / "experiments" / "slurm" / "pretrain.sbatch"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")

# As the real one: starts the tasks, tells nobody when one ends well, ends the others with SIGTERM
# when one ends badly (--kill-on-bad-exit), and ends with the highest code.
SRUN = """#!/usr/bin/env bash
[[ " $* " == *" --kill-on-bad-exit=1 "* ]] || exit 99
while [[ $1 == --* ]]; do shift; done
per_node=${SLURM_TASKS_PER_NODE%%(*}
tasks=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_NODEID=$((rank / per_node)) \
        SLURM_PROCID=$rank SLURM_LOCALID=$((rank % per_node)) "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" > "$STAND_INS/tasks"
highest=0
for _ in "${tasks[@]}"; do
    wait -n
    code=$?
    ((code == 0)) || kill -TERM "${tasks[@]}" 2> /dev/null
    ((code <= highest)) || highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2 $3" in
    requeue*) echo "$2" >> "$STAND_INS/requeued" ;;
    *) exit 99 ;;
esac
"""
# In the place of Python: says what it was given, keeps its environment, and ends with the code of
# its rank, whatever signals come from those who have ended.
TASK = """#!/usr/bin/env bash
trap '' TERM
env -0 > "$STAND_INS/environment$SLURM_PROCID"
touch "$STAND_INS/up$SLURM_PROCID"
until [[ -e $STAND_INS/up0 && -e $STAND_INS/up1 ]]; do sleep 0.01; done
echo "$(printf '%s|' "$@")"
read -ra codes <<< "$CODES"
exit "${codes[$SLURM_PROCID]}"
"""


class Job:
    """A job of two tasks, on one node or on two, as sbatch would start it."""

    def __init__(self, nodes: int, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.said = folder, folder / "slurm.out"
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "task": TASK}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.environment = {
            **environment,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "STAND_INS": str(folder),
            "SLURM_JOB_ID": str(100_000 + os.getpid()),
            "SLURM_JOB_NODELIST": "node1" if nodes == 1 else "localhost,elsewhere",
            "SLURM_NTASKS": "2",
            "SLURM_TASKS_PER_NODE": "2" if nodes == 1 else "1(x2)",
            **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"),
            "ENVIRONMENT": "BATCH",
        }

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        with self.said.open("a") as file:
            return subprocess.Popen(
                ["bash", str(SCRIPT), *words],
                cwd=ROOT,
                env={**self.environment, **environment},
                stdout=file,
                stderr=file,
            )

    def lines(self) -> list[str]:
        return self.said.read_text().splitlines()

    def requeued(self) -> int:
        """How often the job was asked to be requeued."""
        path = self.folder / "requeued"
        asked = path.read_text().split() if path.exists() else []
        assert set(asked) <= {self.environment["SLURM_JOB_ID"]}
        return len(asked)


@pytest.fixture
def job(tmp_path, environment) -> Callable[[int], Job]:
    return lambda nodes: Job(nodes, tmp_path, environment)


def test_the_file_is_sound():
    for check in (["bash", "-n"], [SHELLCHECK]):
        done = subprocess.run([*check, SCRIPT], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_slurm_is_asked_for_a_signal_and_may_requeue():
    lines = SCRIPT.read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    # Slurm reads them up to the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert {"--signal=USR1@180", "--requeue", "--open-mode=append"} <= set(asked)


@pytest.mark.parametrize(
    ("codes", "ends", "requeued"),
    [("0 0", 0, 0), ("75 75", 75, 1), ("138 75", 138, 1), ("1 2", 2, 0), ("75 137", 137, 0)],
)
def test_only_a_preemption_is_requeued_and_every_code_is_passed_on(codes, ends, requeued, job):
    job = job(1)
    started = job.start("--check", "two words", PYTHON=str(job.folder / "task"), CODES=codes)
    assert started.wait(timeout=PATIENCE) == ends
    assert job.requeued() == requeued
    assert job.lines()[:2] == ["main_cmd.py|--check|two words|"] * 2


@pytest.mark.parametrize(
    ("nodes", "address", "local_ranks", "local_size"),
    [(1, "127.0.0.1", (0, 1), "2"), (2, "localhost", (0, 0), "1")],
)
def test_each_task_reads_its_place_and_where_all_meet(
    nodes, address, local_ranks, local_size, job, monkeypatch
):
    job = job(nodes)
    started = job.start(PYTHON=str(job.folder / "task"), CODES="0 0")
    assert started.wait(timeout=PATIENCE) == 0
    ports = set()
    for rank in (0, 1):
        given = (job.folder / f"environment{rank}").read_text().split("\0")[:-1]
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", dict(line.split("=", 1) for line in given))
            assert launch.place() == (rank, 2, local_ranks[rank])
            assert os.environ["MASTER_ADDR"] == address
            assert os.environ["LOCAL_WORLD_SIZE"] == local_size
            ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 1


def options(command, folder: Path, epochs: int) -> list[str]:
    """What follows main_cmd.py for a run of so many epochs of 2 steps."""
    some = f"TRAIN.BATCH_SIZE_PER_GPU 4 TRAIN.EPOCHS {epochs} PRINT_FREQ 1"
    return command(folder / "run", some)[1:]


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_preempted_run_is_requeued_and_its_second_start_finishes_it(
    nodes, number, job, command, environment
):
    """The second start is as this one would start the processes."""
    job = job(nodes)
    words = options(command, job.folder, 12)
    started = job.start(*words)
    deadline = time.monotonic() + PATIENCE
    while "step 1/24" not in job.said.read_text():
        assert started.poll() is None, job.said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for task in (job.folder / "tasks").read_text().split():
        os.kill(int(task), number)
    assert started.wait(timeout=PATIENCE) == 75, job.said.read_text()
    assert job.requeued() == 1
    told = [line for line in job.lines() if line.startswith("preempted: ")]
    assert len(told) == nodes  # once for each
    assert all(number.name in line for line in told)
    before = load(job.folder / "run")["step"]
    assert before < 24
    again = run_group(2, "main_cmd.py", *words, environment=environment)
    assert load(job.folder / "run")["step"] == 24
    (resumed,) = [line for line in again.stdout.splitlines() if line.startswith("resuming from")]
    assert f"at step {before}" in resumed
