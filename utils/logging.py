"""What a run tells: lines for people, log.txt for programs, TensorBoard; on rank 0 only.

log.txt holds one JSON object a line: step, epoch and every figure.
"""

import contextlib
import io
import json
import logging
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from utils.errors import InputError
from utils.files import write_text

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

    A resumed run goes on where its checkpoint was written: what was logged after it is cut, that
    is all but the first `lines` lines, or those of steps up to first_step where `lines` is not
    known. (Steps are numbered anew where a run goes on with steps of another size.) The attribute
    `lines` is how many there are. go_on: what the disk refuses waits in memory, with one warning,
    and is written with a later line; else an InputError is raised. Neither file ever holds a torn
    line or record.
    """

    # TensorBoard's events are written here and now: tensorboardX's own writer does it in a
    # thread, which a full disk ends with a traceback, and then its queue blocks the training.

    def __init__(
        self,
        folder: Path,
        first_step: int,
        prefix: str = "",
        go_on: bool = False,
        lines: int | None = None,
    ) -> None:
        path, events = folder / f"{prefix}log.txt", folder / f"{prefix}tensorboard"
        self._path, self._go_on, self._is_refused = path, go_on, False
        try:
            kept = []
            if path.exists() and first_step > 0:
                found = path.read_text(encoding="utf-8", errors="replace").splitlines()
                kept = [line for line in found if _step(line) <= first_step]
                if lines is not None:
                    kept = found[:lines]
            self.lines = len(kept)
            write_text(path, "".join(f"{line}\n" for line in kept), "log")
            self._lines = _Records(path)
            events.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
            self._events = _Records(events / name)
            self._events.add(_framed(Event(wall_time=time.time(), file_version="brain.Event:2")))
            # Events of an earlier try, beyond the checkpoint or without one, are marked as void.
            start = SessionLog(status=SessionLog.START)
            void = Event(wall_time=time.time(), step=first_step + 1, session_log=start)
            self._events.add(_framed(void))
            self._events.flush()
        except OSError as error:
            raise self._refusal(error) from None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One line: `figures` (with the epoch among them) after optimizer step `step`."""
        line = {"step": step, **{name: _short(value) for name, value in figures.items()}}
        self._lines.add(f"{json.dumps(line)}\n".encode())
        self.lines += 1
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        for value in values:
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=[value]))
            self._events.add(_framed(event))
        self._try(self._lines.flush, self._events.flush)

    def sync(self) -> None:
        """Bring log.txt to the disk itself, so that a power cut leaves what was logged."""
        self._try(self._lines.flush, self._lines.sync)

    def close(self) -> None:
        """Write what waits, if the disk now takes it, and say what is lost if not."""
        with contextlib.suppress(OSError):
            self._lines.flush()
            self._events.flush()
        if self._lines.waiting:
            logger.warning(f"{len(self._lines.waiting)} lines of {self._path} are lost")
        for records in (self._lines, self._events):
            with contextlib.suppress(OSError):
                records.close()

    def _try(self, *actions: Callable[[], None]) -> None:
        try:
            for action in actions:
                action()
        except OSError as error:
            if not self._go_on:
                raise self._refusal(error) from None
            if not self._is_refused:
                logger.warning(f"{self._refusal(error)} What it lacks is written when it can be.")
            self._is_refused = True
            return
        if self._is_refused and not self._lines.waiting and not self._events.waiting:
            logger.info(f"the log {self._path} is written again, and whole")
            self._is_refused = False

    def _refusal(self, error: OSError) -> InputError:
        return InputError(
            f"the log {self._path} cannot be written ({error.strerror}).", everywhere=False
        )


class _Records:
    """A file that grows by whole records; those that the disk refuses wait in memory."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._end = os.fstat(self._file.fileno()).st_size
        self.waiting: list[bytes] = []

    def add(self, record: bytes) -> None:
        """For the next `flush`."""
        self.waiting.append(record)

    def flush(self) -> None:
        """Write all that waits, or raise OSError and leave the file as it was."""
        data = b"".join(self.waiting)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(data)
        self.waiting = []

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _framed(event: Event) -> bytes:
    """An event as TensorBoard's files hold it: its length and itself, each with a checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + sums[0] + data + sums[1]


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
