"""What files hold: a hash of the bytes of each, kept so that a file is read once."""

import contextlib
import hashlib
import itertools
import json
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils.errors import InputError
from utils.files import replacing
from utils.logging import progress

FORMAT = 1  # to be raised whenever hashes that were kept no longer say the same
# A file that was changed so shortly before it is read may change again within one tick of its
# file system's clock: its hash is not kept.
SETTLED_SECONDS = 2
SECONDS_BETWEEN_WRITES = 60  # of hashes, so that a start that was ended need not begin again
_THREADS = 16  # which wait for the disk more than they compute
_AT_ONCE = 256  # files of a thread's task
_BLOCK = 2**20  # bytes


def cache_folder(kind: str, folder: Path) -> Path:
    """Where the user's cache keeps what is known of a folder, of one kind.

    A place where nothing can be kept for a user without a home, as in some containers.
    """
    home = os.path.expanduser("~/.cache")
    cache = os.environ.get("XDG_CACHE_HOME") or (home if os.path.isabs(home) else os.devnull)
    return Path(cache, "cmd", kind, hashlib.sha256(os.fsencode(folder)).hexdigest()[:16])


def digests(folder: Path, names: Sequence[str]) -> list[str]:
    """A hash of the bytes of each of these files in a folder; "" of one that cannot be read.

    Hashes are kept in the user's cache folder, each with its file's size, times of change and
    number: whatever changes a file changes one of these, and then it is read again.
    """
    place = cache_folder("contents", Path(os.path.realpath(folder))) / "digests.json"
    known: dict[str, list] = {}
    # There is none, or what is there is none of ours.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(place.read_bytes())
        known = stored["files"] if stored["format"] == FORMAT else {}
    settled = time.time_ns() - SETTLED_SECONDS * 10**9
    found, new, written = [], False, time.monotonic()

    def read(part: Sequence[str]) -> list[list]:
        return [_entry(os.path.join(folder, name), known.get(name)) for name in part]

    def write() -> None:
        with contextlib.suppress(OSError, InputError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, "files": known}))

    parts = [names[first : first + _AT_ONCE] for first in range(0, len(names), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = itertools.chain.from_iterable(pool.map(read, parts))
        try:
            for entry in progress(entries, "files read for their fingerprint", len(names)):
                name = names[len(found)]
                found.append(entry[-1])
                if entry is not known.get(name) and max(entry[1:3], default=settled) < settled:
                    known[name], new = entry, True
                if new and time.monotonic() - written > SECONDS_BETWEEN_WRITES:
                    write()
                    new, written = False, time.monotonic()
        finally:
            # Ctrl-C need not wait for all the others.
            pool.shutdown(cancel_futures=True)
    if new:
        write()
    return found


def _entry(path: str, known: list | None) -> list:
    """[size, time of change, of the record's, in ns, number, hash] of a file; [""] if unreadable.

    known: the same as it was; it is given back where the file is still that one.
    """
    try:
        status = os.stat(path)
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            return [""]
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        if known is not None and known[:-1] == stamp:
            return known
        digest = hashlib.blake2b(digest_size=16)
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return [*stamp, digest.hexdigest()]
    except OSError:
        return [""]
