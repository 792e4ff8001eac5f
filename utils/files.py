"""Writing files so that no half file ever stands under its name, and earlier ones survive."""

import contextlib
import glob
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import InputError

# What the user's files are made with; it can only be read by setting it.
_UMASK = os.umask(0o077)
os.umask(_UMASK)
_HOST = socket.gethostname().replace(".", "-")
# After this long an unfinished file of another machine counts as left by a killed writer.
ABANDONED_SECONDS = 24 * 3600


@contextlib.contextmanager
def replacing(path: str | Path, what: str = "file") -> Iterator[Path]:
    """A temporary name for a file or a folder; at the end of the block it is renamed to `path`.

    A file must be closed by then; it is flushed to the disk first. For a folder, `path` must be
    absent or an empty folder. Where the block fails, whatever was at `path` is still there and
    nothing is left over; an OSError becomes an InputError that calls it `what`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")
    try:
        for other in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if _is_abandoned(other):
                _remove(other)
        yield temporary
        if not temporary.is_dir():
            temporary.chmod(0o666 & ~_UMASK)  # safetensors writes for the owner alone
            sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"the {what} {path} could not be written: {error.strerror or error}."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            _remove(temporary)


def _remove(path: Path) -> None:
    """Remove a file or a folder; nothing where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path, option: str = "--output_dir") -> None:
    """Make a folder, and those above it; raises InputError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{option} {path} cannot be written ({error.strerror}): choose another."
        ) from None


def write_text(path: str | Path, text: str, what: str = "file") -> None:
    """Write a text file whole; see `replacing`."""
    with replacing(path, what) as temporary:
        # File names in it may hold any bytes.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, contents: Any, what: str = "file") -> None:
    """Write indented JSON whole; see `replacing`."""
    write_text(path, json.dumps(contents, indent=2) + "\n", what)


def _is_abandoned(temporary: Path) -> bool:
    """Whether the writer of a temporary file is no more."""
    *_, host, process, _ = temporary.name.rsplit(".", 3)
    try:
        if host == _HOST:
            os.kill(int(process), 0)
            return int(process) == os.getpid()
        return time.time() - temporary.stat().st_mtime > ABANDONED_SECONDS
    except (ProcessLookupError, ValueError, FileNotFoundError):
        return True
    except PermissionError:  # another user's process
        return False


def sync(path: Path) -> None:
    """Bring what was written to a file to the disk itself."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename durable; a file system that cannot is no reason to stop."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
