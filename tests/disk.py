"""A disk without room, and children that are killed while they write."""

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes, as on a disk with no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def forked(work: Callable[[TextIO], None]) -> Iterator[tuple[int, TextIO]]:
    """A child that runs `work(where it tells lines)` and ends; killed after the block.

    Gives its process id and what it tells. An exception of the child is told too.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(os.fdopen(writing, "w", buffering=1, closefd=False))
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        try:
            yield child, told
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable]:
    """A disk of `size` bytes at `folder`, and what fills it: `with fill(leaving=bytes):`.

    Where nothing may be mounted, files of the process that may not grow stand for it.
    """
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        yield lambda leaving: full_disk(leaving)
        return

    @contextlib.contextmanager
    def fill(leaving: int) -> Iterator[None]:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "filler").write_bytes(bytes(max(0, free - leaving)))
        try:
            yield
        finally:
            (folder / "filler").unlink()

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
