"""The pretraining runs of a study: child processes of main_cmd.py, so many at a time."""

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from datasets.benchmarks import Splits
from engine.studies import study_results
from engine.studies.study import ROOT, Study
from utils.errors import InputError
from utils.files import make_folder, write_json
from utils.logging import logger

STDOUT = "stdout.txt"
LOCK = ".lock"
IDENTITY = "identity.json"
SHOWN = 5  # last lines of a failed run
INTERVAL = 0.1  # seconds between two looks at the children


@dataclass(frozen=True)
class Run:
    """One cell with one seed. command: the child's. folder: its output.

    identity: what decides its weights, as study_results.training_identity gives it.
    """

    cell: str
    seed: int
    command: list[str]
    folder: Path
    identity: dict

    @property
    def name(self) -> str:
        return f"{self.cell}-seed{self.seed}"

    @property
    def written(self) -> str:
        """The command as people type it in the repository."""
        words = [word.removeprefix(f"{ROOT}{os.sep}") for word in self.command[1:]]
        return shlex.join(["python", *words])

    def refuse_other(self) -> None:
        """InputError where the folder holds checkpoints of other options, data or processes."""
        if not any(self.folder.glob("*.pth")):
            return  # there is nothing to go on from
        path = self.folder / IDENTITY
        remedy = "another --output_dir, or remove this folder to have the run made again."
        try:
            stored = json.loads(path.read_text())
        except (OSError, ValueError):
            stored = None
        if not isinstance(stored, dict):
            # config.yaml does not tell: each start writes it anew, and it knows no images.
            raise InputError(
                f"{self.folder} holds a run, but no {IDENTITY} that says what it was trained "
                f"with: use {remedy}"
            )
        if differences := study_results.misfit(stored, self.identity, path, weights_only=True):
            raise InputError(
                f"{self.folder} holds a run of another study: {differences}. Use the study as it "
                f"was, {remedy}"
            )

    def tail(self) -> list[str]:
        """The last lines that it printed."""
        text = (self.folder / STDOUT).read_text(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-SHOWN:]


def run_of(
    study: Study, cell: str, seed: int, splits: Splits, output: Path, processes: int = 1
) -> Run:
    """The run of a cell. splits: its images, by folders; output: the study's folder."""
    folder, base = output / "runs" / cell / f"seed{seed}", study.cells[cell].base
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone"]
    launcher += [] if processes == 1 else [f"--nproc_per_node={processes}"]
    arguments = ["--cfg", str(base), "--output_dir", str(folder)]
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
    images = splits.train.fingerprint
    identity = study_results.training_identity(study.config(cell, seed), processes, images)
    return Run(cell, seed, [sys.executable, *launcher, script, *arguments], folder, identity)


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
    Raises InputError where a folder holds another run (Run.refuse_other) or cannot be locked.
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
    lock = locked(run.folder / LOCK)
    if lock is None:
        return None
    with ExitStack() as stack:
        stack.callback(lock.close)
        run.refuse_other()
        write_json(run.folder / IDENTITY, run.identity)
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
        stack.pop_all()
    return _Child(run, process, lock)


def locked(path: Path, wait: bool = False) -> IO | None:
    """The file, locked while it is open; None where another process has it, unless `wait`.

    Raises InputError where it cannot be locked, as on some network file systems.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "w"))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        except OSError as error:
            raise InputError(
                f"{path} cannot be locked ({error.strerror}): choose an --output_dir on a file "
                f"system that can."
            ) from None
        stack.pop_all()
    return file
