"""One run at a time in a folder."""

import fcntl
import os
import socket
from pathlib import Path

from utils.errors import InputError
from utils.files import make_folder
from utils.logging import logger


def claim(folder: Path, work: str) -> None:
    """Make a folder, and keep others from the same work in it until this process ends.

    work: a word, such as pretraining. Raises InputError where another process is at it.

    By a POSIX lock on a file that stays there: it ends with its process, most cluster file systems
    know it between machines, and forked loader processes do not inherit it. (Closing any descriptor
    of the file would give it up.) A file system that has no locks is a warning.
    """
    make_folder(folder)
    path = folder / f".{work}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            raise InputError(
                f"{holder} is at the same work in {folder}: wait for its end, or choose another "
                f"--output_dir."
            ) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        logger.warning(
            f"{path} cannot be locked ({error.strerror}): nothing keeps a second run out of it"
        )
