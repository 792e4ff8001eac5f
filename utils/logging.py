"""What a run tells: lines for people, log.txt for programs, TensorBoard; on rank 0 only.

log.txt holds one JSON object a line: step, epoch and every figure.
"""

import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from tensorboardX import SummaryWriter
from tqdm import tqdm

from utils import distributed
from utils.errors import InputError

logger = logging.getLogger("cmd")
SECONDS_BETWEEN_LINES = 30
T = TypeVar("T")


class _ThroughProgressBar(logging.Handler):
    """Lines that do not tear a progress bar on the same terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader, such as `head`, has seen enough; the work goes on.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def setup(is_main: bool) -> None:
    """Plain lines on stdout, from rank 0 alone; a warning says that it is one."""
    logger.handlers = [_ThroughProgressBar()]
    logger.handlers[0].setFormatter(_Formatter())
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    logger.propagate = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()


def on_terminal() -> bool:
    """Whether a progress bar makes sense: a person is looking at rank 0's stderr."""
    return sys.stderr.isatty() and int(os.environ.get("RANK", 0)) == 0


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Go through `total` items: a bar on a terminal, elsewhere a line twice a minute; rank 0."""
    if on_terminal():
        yield from tqdm(items, desc=what, total=total, leave=False)
        return
    told = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            logger.info(f"{what}: {done} of {total}")
        yield item


class RunLog:
    """log.txt and TensorBoard of one run's folder; `prefix` sets both names apart.

    A resumed run goes on where its checkpoint was written: what was logged after it is cut.
    """

    def __init__(self, folder: Path, first_step: int, prefix: str = "") -> None:
        path, temporary = folder / f"{prefix}log.txt", folder / f".{prefix}log.txt.tmp"
        kept = []
        try:
            if path.exists() and first_step > 0:
                kept = [line for line in path.read_text().splitlines() if _step(line) <= first_step]
            temporary.write_text("".join(f"{line}\n" for line in kept))
            os.replace(temporary, path)
            self._file = path.open("a")
        except OSError as error:
            raise _not_written(path, error) from None
        # Events of an earlier try, beyond the checkpoint or without one, are marked as void.
        self._board = SummaryWriter(
            str(folder / f"{prefix}tensorboard"), purge_step=first_step + 1, flush_secs=30
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One line: `figures` (with the epoch among them) after optimizer step `step`."""
        line = {"step": step, **{name: _short(value) for name, value in figures.items()}}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise _not_written(self._file.name, error) from None
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _not_written(path: str | Path, error: OSError) -> InputError:
    return InputError(f"the log {path} cannot be written ({error.strerror}).", everywhere=False)


def _step(line: str) -> float:
    """The step of a log line; a torn last line belongs to what is cut."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _short(value: float) -> float | None:
    """Seven digits; null for what JSON has no number for (fp16's first gradients overflow)."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.7g}") if isinstance(value, float) else value


class Window:
    """Means of device scalars over the steps since the last log line, without host syncs."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, figures: Mapping[str, torch.Tensor]) -> None:
        """Add one step's figures; the same names every time."""
        self._names = list(figures)
        values = torch.stack([value.detach().float() for value in figures.values()])
        self._sum = values if self._sum is None else self._sum + values
        self._count += 1

    def fetch(self, extra: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Means over window and processes, and `extra` meant over processes; starts anew.

        The one host sync of a log line.
        """
        if self._sum is None:
            raise RuntimeError("Window.fetch was called before any step was added")
        names = [*self._names, *extra]
        values = [self._sum / self._count]
        if extra:
            values.append(torch.stack([value.float() for value in extra.values()]))
        means = distributed.mean(torch.cat(values)).tolist()
        self._sum, self._count = None, 0
        return dict(zip(names, means, strict=True))
