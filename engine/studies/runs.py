"""The pretraining runs of a study: child processes of main_cmd.py, so many at a time."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.splits import Splits
from engine.studies.results import misfit
from engine.studies.spec import ROOT, Study
from utils import config
from utils.errors import InputError
from utils.files import make_folder, write_json
from utils.logging import logger

STDOUT = "stdout.txt"
IDENTITY = "identity.json"
SHOWN = 5  # last lines of a failed run
INTERVAL = 0.1  # seconds between two looks at the children


@dataclass(frozen=True)
class Run:
    """One cell with one seed. command: the child's. folder: its output.

    identity: what decides its weights: options, processes, the training images' fingerprint.
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
            # config.yaml cannot say it: each start writes it anew, and it knows no images.
            raise InputError(
                f"{self.folder} holds a run, but no {IDENTITY} that says what it was trained "
                f"with: use {remedy}"
            )
        if differences := misfit(stored, self.identity, path, weights_only=True):
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
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    folder = output / "runs" / cell / f"seed{seed}"
    command += [str(ROOT / "main_cmd.py"), "--cfg", str(study.cells[cell].base)]
    command += ["--output_dir", str(folder), "--data_path", str(splits.train.root)]
    cfg = study.config(cell, seed)
    options: dict[str, Any] = {"SEED": seed} | study.cells[cell].options
    options["DATA.CROPS"] = cfg.DATA.CROPS  # as settled here, wherever the command is repeated
    for key, value in options.items():
        command += [key, str(value)]
    identity = {
        "options": config.to_dict(cfg),
        "processes": processes,
        "images": splits.train.fingerprint,
    }
    return Run(cell, seed, command, folder, identity)


def pretrained(runs: Iterable[Run], at_once: int = 1) -> Iterator[tuple[Run, int]]:
    """(run, exit code) of each run as it ends; `at_once` side by side.

    Where the iterator is closed, or its caller's thread is interrupted in it, the children get
    SIGTERM, on which they write a checkpoint, and are waited for. A child refuses a folder in which
    another process trains. Raises InputError where a folder holds another run (Run.refuse_other).
    """
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if at_once > 1 else {})
    waiting = list(runs)
    children: list[tuple[Run, subprocess.Popen]] = []
    try:
        while waiting or children:
            while waiting and len(children) < at_once:
                run = waiting.pop(0)
                children.append((run, _start(run, environment)))
                logger.info(f"{run.name}: pretraining; its lines are in {run.folder / STDOUT}")
            for run, process in list(children):
                if process.poll() is not None:
                    children.remove((run, process))
                    yield run, process.returncode
            time.sleep(INTERVAL)
    finally:
        for _, process in children:
            process.terminate()
        for _, process in children:
            process.wait()


def _start(run: Run, environment: dict[str, str]) -> subprocess.Popen:
    """The run as a process, of a session of its own: Ctrl-C reaches it as SIGTERM only."""
    make_folder(run.folder)
    run.refuse_other()
    write_json(run.folder / IDENTITY, run.identity)
    with open(run.folder / STDOUT, "ab") as stdout:
        return subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
