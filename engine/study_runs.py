"""The pretraining runs of a study: child processes of main_cmd.py, so many at a time."""

import fcntl
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from datasets.benchmarks import Splits
from engine.study import ROOT, Study
from utils.files import make_folder
from utils.logging import logger

STDOUT = "stdout.txt"
LOCK = ".lock"
SHOWN = 5  # last lines of a failed run
INTERVAL = 0.1  # seconds between two looks at the children


@dataclass(frozen=True)
class Run:
    """One cell with one seed. command: the child's. folder: its output."""

    cell: str
    seed: int
    command: list[str]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.cell}-seed{self.seed}"

    @property
    def written(self) -> str:
        """The command as people type it in the repository."""
        words = [word.removeprefix(f"{ROOT}{os.sep}") for word in self.command[1:]]
        return shlex.join(["python", *words])

    def tail(self) -> list[str]:
        """The last lines that it printed."""
        text = (self.folder / STDOUT).read_text(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-SHOWN:]


def run_of(
    study: Study, cell: str, seed: int, splits: Splits, output: Path, processes: int = 1
) -> Run:
    """The run of a cell. splits: its images, by folders; output: the study's folder."""
    folder = output / "runs" / cell / f"seed{seed}"
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone"]
    launcher += [] if processes == 1 else [f"--nproc_per_node={processes}"]
    arguments = ["--cfg", str(study.base), "--output_dir", str(folder)]
    arguments += ["--data_path", str(splits.train.root)]
    options: dict[str, Any] = {"SEED": seed} | study.cells[cell].options
    if study.protocol.knn_every:
        options |= {
            "EVAL.KNN_EVERY": study.protocol.knn_every,
            "EVAL.KNN_TRAIN": splits.train.root,
            "EVAL.KNN_VAL": splits.test.root,
            "EVAL.KNN_K": study.protocol.k,
        }
    for key, value in options.items():
        arguments += [key, _text(value)]
    script = str(ROOT / "main_cmd.py")
    return Run(cell, seed, [sys.executable, *launcher, script, *arguments], folder)


def _text(value: Any) -> str:
    """A value as the command line reads it back."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen
    lock: IO
    started: float = field(default_factory=time.monotonic)


def pretrained(runs: Iterable[Run], at_once: int = 1) -> Iterator[tuple[Run, int, float]]:
    """(run, exit code, seconds of this process) of each run as it ends; `at_once` side by side.

    Where the iterator is closed, or its caller's thread is interrupted in it, the children get
    SIGTERM, on which they write a checkpoint, and are waited for. A run in whose folder another
    process still trains, such as one that a killed study left, begins when that has ended.
    """
    waiting, children = list(runs), []
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if at_once > 1 else {})
    told: set[str] = set()
    try:
        while waiting or children:
            for run in list(waiting):
                if len(children) == at_once:
                    break
                child = _start(run, environment)
                if child is not None:
                    logger.info(f"{run.name}: pretraining; its lines are in {run.folder / STDOUT}")
                    waiting.remove(run)
                    children.append(child)
                elif run.name not in told:
                    told.add(run.name)
                    logger.warning(f"{run.name}: another process still trains in {run.folder}")
            for child in list(children):
                code = child.process.poll()
                if code is not None:
                    children.remove(child)
                    child.lock.close()
                    yield child.run, code, time.monotonic() - child.started
            time.sleep(INTERVAL)
    finally:
        for child in children:
            child.process.terminate()
        for child in children:
            child.process.wait()
            child.lock.close()


def _start(run: Run, environment: dict[str, str]) -> _Child | None:
    """The run as a process; None where another one has its folder.

    The child inherits the open lock: as long as it lives the folder is taken, whatever becomes
    of this process. It has a session of its own, so that Ctrl-C reaches it as SIGTERM only.
    """
    make_folder(run.folder)
    lock = open(run.folder / LOCK, "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    with open(run.folder / STDOUT, "ab") as stdout:
        process = subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    return _Child(run, process, lock)
