"""What image files say without being decoded: their headers, and which have the same bytes."""

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch.utils.data import Dataset

from datasets.folder import StoredImages, UnreadableImage, header_size
from datasets.loader import read_each
from utils import distributed
from utils.distributed import World

Place = tuple[int, int]  # (which of several data sets, index of the image in it)
_FILES_AT_ONCE = 64  # that a loader worker is handed
_FEW_FILES = 2000  # are read before loader workers would have started
_TAIL = 4096  # bytes


class Header(NamedTuple):
    """An image file's length in bytes and its two sides in pixels, perhaps turned.

    size: None where the header cannot be read, for the `reason`.
    """

    length: int
    size: tuple[int, int] | None
    reason: str = ""


def read_headers(images: StoredImages, world: World, workers: int) -> list[Header]:
    """The headers of all images in order, a share read by each process; all together."""
    share = distributed.share(len(images), world)
    mine = _each(_Headers(images), share, workers, "reading headers")
    return [header for part in distributed.gather_objects(mine) for header in part]


def equal_files(
    sets: Sequence[StoredImages], headers: Sequence[list[Header]], workers: int
) -> list[list[Place]]:
    """Groups of readable images of all sets with the same bytes, each in the order of the sets.

    Of most files nothing is read: those that are alone with their length and sides differ from
    all others. Of the rest the last bytes are compared first, which in compressed images say
    the most, and then the whole files.
    """
    by_header = defaultdict(list)
    for number, of_set in enumerate(headers):
        for index, header in enumerate(of_set):
            if header.size is not None:
                by_header[header.length, header.size].append((number, index))
    groups = list(by_header.values())
    for tail in (_TAIL, 0):
        groups = [group for group in groups if len(group) > 1]
        places = [place for group in groups for place in group]
        reading = _Digests(sets, places, tail)
        digests = _each(reading, range(len(places)), workers, "comparing images")
        found = dict(zip(places, digests, strict=True))
        groups = [part for group in groups for part in _parts(group, found.get)]
    return sorted(group for group in groups if len(group) > 1)


def _parts(group: list[Place], key: Callable[[Place], bytes | None]) -> list[list[Place]]:
    """The group split by its members' keys; those without one are left out."""
    parts = defaultdict(list)
    for place in group:
        parts[key(place)].append(place)
    parts.pop(None, None)
    return list(parts.values())


class _Headers(Dataset):
    """The header of image i."""

    def __init__(self, images: StoredImages) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Header:
        length = 0
        try:
            source, name = self.images.source(index)
            length = len(source.getbuffer()) if isinstance(source, io.BytesIO) else _length(source)
            return Header(length, header_size(source, name))
        except UnreadableImage as error:
            return Header(length, None, error.bad.reason)


def _length(path: str | os.PathLike) -> int:
    """A file's bytes; 0 where that cannot be told, which its header's reading explains."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


class _Digests(Dataset):
    """A hash of the i-th place's last `tail` bytes, or of all (0); None if it cannot be read."""

    def __init__(self, sets: Sequence[StoredImages], places: list[Place], tail: int) -> None:
        self.sets, self.places, self.tail = sets, places, tail

    def __getitem__(self, index: int) -> bytes | None:
        number, image = self.places[index]
        try:
            source, _ = self.sets[number].source(image)
            with source if isinstance(source, io.BytesIO) else open(source, "rb") as file:
                if self.tail:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - self.tail))
                return hashlib.blake2b(file.read(), digest_size=16).digest()
        except (OSError, UnreadableImage):
            return None


def _each(dataset: Dataset, indices: range, workers: int, what: str) -> list:
    """dataset[i] for the indices in order, by loader workers where there are many."""
    workers = workers if len(indices) > _FEW_FILES else 0
    return read_each(dataset, indices, workers, _FILES_AT_ONCE, what)
