"""What files hold: a hash of each, of bounded cost, kept so that a file is read once."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils.errors import InputError
from utils.files import write_text
from utils.logging import progress

FORMAT = 1  # to be raised whenever hashes that were kept no longer say the same
# A file that was changed so shortly before it is read may change again within one tick of its
# file system's clock: its hash is not kept.
SETTLED_SECONDS = 2
_THREADS = 16  # which wait for the disk more than they compute
_AT_ONCE = 256  # files of a thread's task
# What bounds the cost of a first start: of so many files a part is read, of the others the size
# counts; of a file larger than so many blocks, blocks at even distances.
MOST_FILES = 100_000
DIGEST = 32  # letters of a hash
BLOCK, BLOCKS = 2**18, 64  # bytes, number


def cache_folder(kind: str, folder: Path) -> Path:
    """Where the user's cache keeps what is known of a folder, of one kind.

    A place where nothing can be kept for a user without a home, as in some containers.
    """
    home = os.path.expanduser("~/.cache")
    cache = os.environ.get("XDG_CACHE_HOME") or (home if os.path.isabs(home) else os.devnull)
    return Path(cache, "cmd", kind, hashlib.sha256(os.fsencode(folder)).hexdigest()[:16])


def digests(folder: Path, names: Sequence[str]) -> list[str]:
    """A hash of what each of these files in a folder holds; "" of one that cannot be read.

    Of a file of more than BLOCKS times BLOCK bytes that is its size and so many blocks, the first
    and the last among them. Of more than MOST_FILES files only so many are read, at even distances
    in `names`; of the others the size is given. Hashes are kept in the user's cache folder, each
    with its file's size, times of change and number: whatever changes a file changes one of these,
    and then it is read again.
    """
    place = cache_folder("contents", Path(os.path.realpath(folder))) / "digests.json"
    known: dict[str, list] = {}
    # There is none, or what is there is none of ours.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(place.read_bytes())
        known = stored["files"] if stored["format"] == FORMAT else {}
    settled = time.time_ns() - SETTLED_SECONDS * 10**9
    apart = max(1, math.ceil(len(names) / MOST_FILES))

    def read(part: range) -> list[list]:
        return [
            _entry(os.path.join(folder, names[i]), known.get(names[i]), not i % apart) for i in part
        ]

    parts = [range(len(names))[i : i + _AT_ONCE] for i in range(0, len(names), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = itertools.chain.from_iterable(pool.map(read, parts))
        try:
            found = [*progress(entries, "files read for their fingerprint", len(names))]
        finally:
            # Ctrl-C need not wait for all the others.
            pool.shutdown(cancel_futures=True)
    new = {
        name: entry
        for name, entry in zip(names, found, strict=True)
        if entry is not known.get(name) and len(entry) > 1 and entry[2] < settled
    }
    if new:
        with contextlib.suppress(OSError, InputError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(place, json.dumps({"format": FORMAT, "files": known | new}))
    return [entry[-1] for entry in found]


def _entry(path: str, known: list | None, read: bool) -> list:
    """[size, time of change, of the record's, in ns, number, hash] of a file; [""] if unreadable.

    known: the same as it was; it is given back where the file is still that one. read: whether
    to read it; else [size as text].
    """
    try:
        status = os.stat(path)
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            return [""]
        if not read:
            return [str(status.st_size)]
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        if known is not None and known[:-1] == stamp:
            return known
        return [*stamp, _hash(path, status.st_size)]
    except OSError:
        return [""]


def _hash(path: str, size: int) -> str:
    """Of a file's size and bytes, or blocks of them where it is large."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=DIGEST // 2)
    with open(path, "rb", buffering=0) as file:
        if size <= BLOCK * BLOCKS:
            digest.update(file.read())
        else:
            for block in range(BLOCKS):
                digest.update(
                    os.pread(file.fileno(), BLOCK, (size - BLOCK) * block // (BLOCKS - 1))
                )
    return digest.hexdigest()
