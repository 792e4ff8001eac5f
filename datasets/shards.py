"""Images in tar shards, by the naming of the webdataset library, read at any place.

A shard is an uncompressed tar file; a sample is a group of members with one stem, `a/0001.jpg`
and `a/0001.cls`, and its image the member with an image's ending. Other members are passed over:
pretraining needs no labels.

`python -m datasets.shards --help` writes the shards of an image folder.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import webdataset
from torch import Tensor

from datasets.contents import cache_folder, digests
from datasets.folder import (
    HIDDEN,
    ImageFolder,
    StoredImages,
    UnreadableImage,
    endings_line,
    existing_folder,
    fingerprint_of,
    image_endings,
)
from datasets.strings import Strings
from utils import cli
from utils.errors import InputError, run_script
from utils.files import replacing, write_text
from utils.logging import progress, setup
from utils.seeding import ORDER, derive_seed

# An epoch is shuffled within a moving window of this many images, and at least so many shards.
WINDOW_IMAGES = 8192
WINDOW_SHARDS = 4
# Each process keeps at most so many shards open; a window of more opens them again.
OPEN_SHARDS = 64
# The folder of the index files, beside the shards.
INDEX_FOLDER = ".shard_index"
INDEX_FORMAT = 3  # to be raised whenever older index files no longer say the same
SPECIAL = "links and the like"  # members that are no plain files, among the endings
_THREADS = 16  # indexing waits for the disk more than it computes
_BLOCK = tarfile.BLOCKSIZE

# The size in bytes, and the times of change of a shard and of its record in ns, by which a changed
# one is known: who gives a file an earlier time changes its record.
Stamp = tuple[int, int, int]
Rows = list[tuple[str, int, int]]  # images' (name, offset, size in bytes)


@dataclass(frozen=True)
class ShardIndex:
    """The images of one shard in the tar's order: members' names, and their bytes' places.

    passed_over: numbers of its other members, by their endings.
    """

    stamp: Stamp
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    passed_over: dict[str, int]


class ImageShards(StoredImages):
    """The images of tar shards, shard after shard, without labels.

    shards: a folder, whose `*.tar` are the shards by name, or a brace pattern of their names,
    "/data/train-{000000..000146}.tar". The name of an image is "/folder/shard.tar:member.jpg".

    Every shard has an index file beside it, or in the user's cache folder where that cannot be
    written; it is made at the first use and again when the shard changes. Raises `InputError` for
    shards that are missing, damaged, without images, or hold two images of one name.
    """

    def __init__(self, shards: str | Path) -> None:
        self.shards = find_shards(shards)
        indices = read_indices(self.shards)
        self.passed_over = sum((Counter(index.passed_over) for index in indices), Counter())
        self.say_passed_over(shards)
        self.counts = [len(index.names) for index in indices]
        self._stamps = [index.stamp for index in indices]
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._ends = np.cumsum(self.counts)
        self._members = Strings.of(name for index in indices for name in index.names)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _shard(self, index: int) -> int:
        """The number of the shard with an image."""
        return int(np.searchsorted(self._ends, range(len(self))[index], side="right"))

    def name(self, index: int) -> str:
        return f"{self.shards[self._shard(index)]}:{self._members[index]}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the shards' names and contents, of how many and how large images."""
        contents = digests(self.shards[0].parent, [str(shard) for shard in self.shards])
        names = [shard.name for shard in self.shards]
        return fingerprint_of([names, contents, self.counts, self._sizes.tolist()])

    def source(self, index: int) -> io.BytesIO:
        """The bytes of image `index`; raises `UnreadableImage`."""
        number = self._shard(index)
        size, offset = int(self._sizes[index]), int(self._offsets[index])
        try:
            shard = _open_shard(str(self.shards[number]), self._stamps[number])
            # The record alone changes where a backup links the file.
            unchanged = _stamp(os.fstat(shard.fileno()))[:2] == self._stamps[number][:2]
            # Unlike a mapped file, which ends the process where it has become shorter.
            data = os.pread(shard.fileno(), size, offset)
        except OSError as error:
            raise UnreadableImage(self.name(index), error.strerror) from error
        if not unchanged or len(data) < size:
            raise UnreadableImage(self.name(index), "its shard changed after it was indexed")
        return io.BytesIO(data)


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(path: str, stamp: Stamp) -> io.FileIO:
    """This process's open shard; `stamp` keeps it apart from a file that has taken its name.

    A thread or a forked process may read from what another has opened: reads give their place.
    """
    return open(path, "rb", buffering=0)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True)
class ShardOrder:
    """The order of an epoch that keeps each process in its own few shards (ours).

    counts: images of each shard. world: number of processes. step: images that one process
    takes in an optimizer step. order(epoch) is a permutation of all images, a function of
    (counts, world, step, seed, epoch): the shards are permuted, their images in a row are cut
    into `world` spans of equal numbers, and each span is shuffled within a moving window, so that
    at any moment a process reads from as many shards as hold `window` images. Rank r's span comes
    as its parts of the steps, in the layout of `StepSampler`; what fills no step comes last.

    Unlike a folder's, this order depends on `world`: where a run resumes with another number of
    processes, some images of that epoch may come twice and others not at all.
    """

    counts: Sequence[int]
    world: int
    step: int
    seed: int

    @property
    def window(self) -> int:
        """Images that are shuffled among each other: WINDOW_IMAGES, or WINDOW_SHARDS full."""
        mean = -(-sum(self.counts) // len(self.counts))
        return max(WINDOW_IMAGES, WINDOW_SHARDS * mean)

    def __call__(self, epoch: int) -> Tensor:
        spans = self.spans(epoch)
        steps = sum(self.counts) // (self.step * self.world)
        whole = steps * self.step
        parts = torch.stack([span[:whole].view(steps, self.step) for span in spans], dim=1)
        return torch.cat([parts.flatten(), *(span[whole:] for span in spans)])

    def spans(self, epoch: int) -> list[Tensor]:
        """Each rank's images of the epoch in their order, int64."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
        images = torch.arange(sum(self.counts)).split(list(self.counts))
        shards = torch.randperm(len(self.counts), generator=generator).tolist()
        row = torch.cat([images[shard] for shard in shards])
        moved = torch.rand(len(row), generator=generator, dtype=torch.float64) * self.window
        keys = torch.arange(len(row)) + moved
        ends = [len(row) * rank // self.world for rank in range(self.world + 1)]
        mine = [slice(*pair) for pair in itertools.pairwise(ends)]
        return [row[span][keys[span].argsort(stable=True)] for span in mine]


# Shards and their indices


def find_shards(pattern: str | Path) -> list[Path]:
    """Absolute paths of the shards in a folder, or of those that a brace pattern names."""
    text = os.path.expanduser(str(pattern))
    if os.path.isdir(text) or not ("{" in text or text.endswith(".tar")):
        folder = Path(os.path.abspath(existing_folder(text)))
        shards = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
        if not shards:
            raise InputError(
                f"the data folder {folder} holds no shards (files ending in .tar): put shards "
                "in it, or read a folder of images with DATA.DATASET folder"
            )
        return shards
    try:
        return [Path(os.path.abspath(url)) for url in webdataset.SimpleShardList(text).urls]
    except ValueError as error:
        raise InputError(
            f"the shards {text} cannot be expanded ({error}): write a pattern such as "
            "/data/train-{000000..000146}.tar"
        ) from None


def read_indices(shards: list[Path]) -> list[ShardIndex]:
    """The index of every shard, made and kept for those that have none that fits."""
    with ThreadPoolExecutor(_THREADS) as pool:
        there = pool.map(Path.exists, shards)
        missing = [shard for shard, exists in zip(shards, there, strict=True) if not exists]
        if missing:
            raise InputError(
                f"the shard {missing[0]} does not exist ({len(missing)} of {len(shards)} shards "
                "are missing): complete the set, or give a folder or a pattern such as "
                "/data/train-{000000..000146}.tar"
            )
        try:
            return list(progress(pool.map(_index, shards), "shards indexed", len(shards)))
        finally:
            # A damaged shard, or Ctrl-C, need not wait for all the others.
            pool.shutdown(cancel_futures=True)


def _index_files(shard: Path) -> list[Path]:
    """Where a shard's index may be: beside it, or in the user's cache folder."""
    folder, name = Path(os.path.realpath(shard.parent)), f"{shard.name}.json"
    return [folder / INDEX_FOLDER / name, cache_folder("shard_index", folder) / name]


def _index(shard: Path) -> ShardIndex:
    """The index that is kept if it fits, else read from the tar and kept where it can be."""
    for path in _index_files(shard):
        # There is none, or what is there is none of ours.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            stamp, stored = _stamp(shard.stat()), json.loads(path.read_bytes())
            if (stored["format"], *stored["stamp"]) == (INDEX_FORMAT, *stamp):
                del stored["format"]
                return ShardIndex(**stored | {"stamp": stamp})
    try:
        with open(shard, "rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            rows, passed_over = _read_tar(shard, file)
    except OSError as error:
        raise _unreadable(shard, error.strerror) from None
    if not rows:
        raise InputError(
            f"the shard {shard} holds no images, but {endings_line(passed_over) or 'nothing'}: "
            "remove it or correct the shards' name"
        )
    names, offsets, sizes = map(list, zip(*rows, strict=True))
    index = ShardIndex(stamp, names, offsets, sizes, dict(passed_over))
    text = json.dumps({"format": INDEX_FORMAT, **asdict(index)})
    for path in _index_files(shard):
        with contextlib.suppress(OSError, InputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            break
    return index


def _read_tar(shard: Path, file: io.BufferedReader) -> tuple[Rows, Counter[str]]:
    """The images of a tar file, and the endings of its other members.

    By webdataset's naming `2.mask.png` is another part of the sample whose image is `2.jpg`. Where
    a sample has no such image, the dots belong to names: `a.1.jpg` and `a.2.jpg` are two images.
    """
    passed_over = Counter()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members, plain = [], {}
            for member in tar:
                # tar writes a file's further names as links to the first, which comes before them.
                if member.islnk() and (first := plain.get(member.linkname)):
                    member.type = first.type
                    member.offset_data, member.size = first.offset_data, first.size
                if member.isreg() and not member.issparse():
                    members.append(member)
                    plain[member.name] = member
                elif not member.isdir():
                    passed_over[SPECIAL] += 1
            end = tar.offset
    except (tarfile.TarError, ValueError) as error:
        raise _unreadable(shard, str(error)) from None
    # tarfile takes any broken header but the first for the end.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise _unreadable(shard, f"it is cut short or damaged at byte {end}")
    named = [(member, *_named(member.name)) for member in members]
    whole = {stem for _, stem, end in named if end.lower() in image_endings()}
    rows, seen = [], {}
    for member, stem, end in named:
        ending = os.path.splitext(member.name)[1].lower()
        if member.name.endswith(f"/{end}") or member.name == end:
            ending = HIDDEN
        elif end.count(".") > 1 and stem in whole:
            ending = end.lower()  # of a part
        if ending not in image_endings():
            passed_over[ending] += 1
            continue
        sample = member.name[: -len(ending)]
        if sample in seen:
            raise InputError(
                f"the shard {shard} holds two images of the sample {sample} ({seen[sample]} and "
                f"{member.name}): write it again with one name for each image"
            )
        seen[sample] = member.name
        rows.append((member.name, member.offset_data, member.size))
    return rows, passed_over


def _named(member: str) -> tuple[str, str]:
    """A member's name, cut before the first dot of the file's own name."""
    folder, slash, name = member.rpartition("/")
    stem, dot, end = name.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{end}"


def _unreadable(shard: Path, reason: str | None) -> InputError:
    return InputError(
        f"the shard {shard} cannot be read ({reason}): copy or write it again, uncompressed"
    )


# Writing shards


def write_shards(
    folder: str | Path, output: str | Path, images_per_shard: int = 1000
) -> tuple[int, int]:
    """Write the images of a folder as `output/shard-000000.tar` and so on.

    Members are `<number>.<suffix>`, an unchanged file, and where the folder has class subfolders
    `<number>.cls`, the class's place among their sorted names, which classes.txt lists. The images
    are shuffled, always in the same way; the same folder gives the same bytes. `output` appears
    whole or not at all.

    Returns (images, shards). Raises `InputError`, also where `output` holds anything.
    """
    images, output = ImageFolder(folder), Path(output).expanduser().absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"--output {output} already exists: choose another folder or delete it")
    generator = torch.Generator().manual_seed(derive_seed(0, ORDER))
    order = torch.randperm(len(images), generator=generator).tolist()
    with replacing(output, "shards") as unfinished:
        unfinished.mkdir(parents=True)
        if images.classes:
            lines = "".join(f"{name}\n" for name in images.classes)
            (unfinished / "classes.txt").write_bytes(os.fsencode(lines))
        pattern = f"{unfinished}/shard-".replace("%", "%%") + "%06d.tar"
        with webdataset.ShardWriter(
            pattern, images_per_shard, float("inf"), verbose=0, encoder=False, mtime=0
        ) as writer:
            for place in progress(order, "writing images", len(order)):
                path = images.source(place)
                sample = {"__key__": f"{place:08d}", path.suffix[1:].lower(): path.read_bytes()}
                if images.classes:
                    sample["cls"] = str(images.labels[place].item()).encode()
                writer.write(sample)
    return len(images), -(-len(images) // images_per_shard)


def main() -> None:
    """Write the shards that the command line asks for and say so in one line."""
    parser = cli.Parser(
        prog="python -m datasets.shards",
        description="Write a folder of images as tar shards, for DATA.DATASET shards.",
    )
    parser.add_argument("--data_path", required=True, help="folder of images")
    parser.add_argument("--output", required=True, help="folder to write, new or empty")
    parser.add_argument(
        "--images_per_shard", type=cli.at_least(1), default=1000, help="(%(default)s)"
    )
    args = parser.parse_args()
    setup(is_main=True)
    count, shards = write_shards(args.data_path, args.output, args.images_per_shard)
    print(f"wrote {count} images in {shards} shards to {args.output}")


if __name__ == "__main__":
    run_script(main)
