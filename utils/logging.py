"""A run's log: lines for people, log.txt for programs, TensorBoard; on rank 0 only.

log.txt holds one JSON object a line: step, epoch and every figure.
"""

import contextlib
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

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from utils.errors import InputError
from utils.files import sync, write_text

logger = logging.getLogger("cmd")
SECONDS_BETWEEN_LINES = 30
T = TypeVar("T")


class _ThroughProgressBar(logging.Handler):
    """Lines that do not tear a progress bar on the same terminal; a warning says that it is one."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        try:
            tqdm.write(prefix + record.getMessage(), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader, such as `head`, has seen enough; the work goes on.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def setup(is_main: bool) -> None:
    """Plain lines on stdout, from rank 0 alone."""
    logger.handlers = [_ThroughProgressBar()]
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    logger.propagate = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes


def on_terminal() -> bool:
    """Whether a progress bar makes sense: a person is looking at rank 0's stderr."""
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Go through `total` items: a bar on a terminal, elsewhere a line twice a minute; rank 0."""
    if on_terminal():
        yield from tqdm(items, desc=what, total=total, leave=False)
        return
    last_line = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            logger.info(f"{what}: {done} of {total}")
        yield item


class RunLog:
    """log.txt and TensorBoard of one run's folder.

    A resumed run goes on where its checkpoint was written: of the log the first `lines` lines stay,
    as many as it had then (their steps may have another size); TensorBoard shows no event after
    first_step. The attribute `lines` is how many there are. What the disk refuses is an InputError.
    """

    def __init__(self, folder: Path, lines: int, first_step: int) -> None:
        self._path = folder / "log.txt"
        with self._writing():
            text = self._path.read_bytes() if self._path.exists() else b""
            # What a power cut has torn lies beyond them, as `sync` comes before a checkpoint.
            kept = text.decode("utf-8", "replace").splitlines()[:lines]
            self.lines = len(kept)
            write_text(self._path, "".join(f"{line}\n" for line in kept), "log")
            events = folder / "tensorboard"
            events.mkdir(exist_ok=True)
            # Not SummaryWriter, whose thread ends with a traceback on a full disk, after which its
            # queue blocks the training.
            self._events = EventsWriter(str(events / "events"), f".{time.time_ns()}")
            # SummaryWriter's purge_step: events of an earlier start, beyond the checkpoint.
            start = SessionLog(status=SessionLog.START)
            self._write_event(first_step + 1, session_log=start)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One line: `figures` (with the epoch among them) after optimizer step `step`."""
        line = {"step": step, **{name: _short(value) for name, value in figures.items()}}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        with self._writing():
            _append(self._path, f"{json.dumps(line)}\n")
            self.lines += 1
            self._write_event(step, summary=Summary(value=values))

    def sync(self) -> None:
        """Bring log.txt to the disk itself, so that a power cut leaves what was logged."""
        with self._writing():
            sync(self._path)

    def close(self) -> None:
        """Close TensorBoard's file; every line and event is written already."""
        with contextlib.suppress(OSError):
            self._events.close()

    def _write_event(self, step: int, **contents: SessionLog | Summary) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **contents))
        self._events.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"the log {self._path} cannot be written ({error.strerror})."
            ) from None


def _append(path: Path, text: str) -> None:
    """Add to a file's end, or raise OSError and leave the file as it was."""
    end = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        os.truncate(path, end)
        raise


def _short(value: float) -> float | None:
    """Seven digits; null for what JSON has no number for (fp16's first gradients overflow)."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.7g}") if isinstance(value, float) else value
