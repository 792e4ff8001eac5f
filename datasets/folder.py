"""Images on the disk: decoding one file, lists of labelled files, folders of images."""

import contextlib
import functools
import hashlib
import json
import mmap
import os
import stat
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from datasets.contents import digests
from datasets.strings import Strings
from utils.errors import InputError
from utils.logging import logger

# What Pillow only recognises, or leaves to another program to decode.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Folders of copies, of what was deleted and of the like, which systems put among a user's own.
SYSTEM_FOLDERS = {
    *("@eaDir", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "lost+found"),
    "System Volume Information",
}
ENDINGS_SHOWN = 5
HIDDEN = "hidden"  # files and folders whose names begin with a dot, among the endings
CONTENTS = "contents:"  # what fingerprints begin with; earlier ones knew sizes alone
MAX_ELONGATION = 4  # of a reduced image
DEEP_GREY = ("I", "F")  # first letters of Pillow's modes of more than 8 bits
LOOKED_AT = 1000  # images, to say how many are of these modes
_said = mmap.mmap(-1, 1)  # whether a guess was said; the loader's processes share it by forking
# PIL warns of damaged EXIF data and large images: what cannot be used is an UnreadableImage.
warnings.filterwarnings("ignore", module=r"PIL\.")
# A PNG whose text or colour profile is larger than 1 MB would be refused, which nobody reads.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


@dataclass(frozen=True)
class BadImage:
    """Stands in for a sample whose image could not be decoded; each field is one line.

    A marker, because an exception that leaves a worker process carries its traceback along.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"the image {self.path} cannot be read ({self.reason}): repair it or remove it"


class UnreadableImage(InputError):
    """A file that cannot be decoded as an image; `bad` is its marker."""

    def __init__(self, path: str, reason: str) -> None:
        self.bad = BadImage(path, reason)
        super().__init__(str(self.bad))


def load_image(
    source: str | Path | BinaryIO, shorter_side: int = 0, name: str | Path = ""
) -> Image.Image:
    """Decode one image file as upright RGB, 8 bits a channel.

    source: a path, or an open file, which messages call `name`. shorter_side: pixels; a larger
    image is reduced to its `capped_size`, bicubic and antialiased; 0 keeps all as they are.
    The EXIF orientation is applied; of an animation the first frame is taken. Palettes, CMYK,
    YCbCr, LAB, HSV and 1 bit are converted as Pillow does, transparency is dropped, as is usual in
    the field; for grey of more than 8 bits see `_eight_bits`. Raises `UnreadableImage`.
    """
    with _opened(source, name) as image:
        stored, size = image.size, capped_size(image.size, shorter_side)
        to_rgb = partial(_to_rgb, name=str(name or source), deep=_is_deep(image))
        if size == stored:
            return to_rgb(_upright(image))
        # A JPEG decodes faster to 1/2, 1/4 or 1/8 of its size; twice the pixels that are
        # wanted leave the resize its quality. Other formats ignore this.
        drafted = image.draft(None, (2 * size[0], 2 * size[1]))
        if image.size != stored:
            # The last row and column may lie in part beyond the image: the box leaves that out.
            reduced = image.resize(size, Image.Resampling.BICUBIC, box=drafted[1])
            return to_rgb(_upright(reduced))
        upright = to_rgb(_upright(image))
        size = capped_size(upright.size, shorter_side)
        return upright.resize(size, Image.Resampling.BICUBIC)


@contextlib.contextmanager
def _opened(source: str | Path | BinaryIO, name: str | Path) -> Iterator[Image.Image]:
    """The image file opened; whatever fails in the block is an `UnreadableImage`."""
    try:
        if isinstance(source, str | Path):
            status = os.stat(source)
            # Opening a pipe would wait for ever.
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a file")
            if not status.st_size:
                raise ValueError("the file is empty")
        with Image.open(source) as image:
            yield image
    # PIL's decoders meet broken files with exceptions of every kind.
    except Exception as error:
        raise UnreadableImage(str(name or source), _reason(error)) from error


def capped_size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """The two sides, in pixels, to which `load_image` reduces an image of these two.

    The shorter is at most `shorter_side`, the longer at most MAX_ELONGATION times that, because
    a batch is padded to its largest image. The aspect is kept, nothing is enlarged; 0: no cap.
    """
    scale = min(shorter_side / min(size), MAX_ELONGATION * shorter_side / max(size))
    if not shorter_side or scale >= 1:
        return size
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation; as it is stored where that cannot be read."""
    image.load()  # damaged pixels are found here; below, damaged EXIF data are forgiven
    try:
        image.getexif()  # read before the raw bytes go, which PIL would write anew, damage and all
        image.info.pop("exif", None)
        return ImageOps.exif_transpose(image)
    except Exception:
        return image.copy()


def _is_deep(image: Image.Image) -> bool:
    """Whether an image, opened and not read, has 16 bits a colour: Pillow takes the high 8."""
    return any(";16" in str(tile[3]) for tile in image.tile) and image.mode[0] not in DEEP_GREY


def _to_rgb(image: Image.Image, name: str, deep: bool) -> Image.Image:
    if image.mode[0] in DEEP_GREY:
        image = _eight_bits(image, name)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    if deep and not image.getbbox():
        raise ValueError(
            "of its 16 bits a colour the high 8 are read, and all of them are 0: save it with 8"
        )
    return image


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 or 32 bits or of floating point as mode L.

    No file says which value is white: docs/evaluation.md has the rule. Unless the range of 16 bits
    is used, that is said, once.
    """
    values = np.asarray(image)
    largest = values[np.isfinite(values)].max(initial=0)
    whites, excess = ((1, 255, 65535), 2) if image.mode == "F" else ((255, 4095, 65535), 1)
    white = next((white for white in whites if largest <= excess * white), largest)
    if not _said[0] and (white != 65535 or largest < 2**14):
        _said[0] = 1
        logger.warning(
            f"{name} has pixels of {'floating point' if image.mode == 'F' else 'more than 8 bits'} "
            f"up to {largest:g}, and no file says which value is white: {white:g} is taken, and "
            "in other images by the same rule (docs/evaluation.md)"
        )
    levels = np.floor(values / 256) if white == 65535 else np.rint(values * (255 / white))
    return Image.fromarray(np.nan_to_num(levels).clip(0, 255).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image in a known format"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


class StoredImages(ABC):
    """Encoded images, wherever they lie: `source` and `name` say where.

    unlisted: folders that could not be listed; the images below them are not among these.
    passed_over: numbers of other files, by their endings. fingerprint: see `LabelledImages`.
    `load` raises `UnreadableImage`.
    """

    unlisted: Sequence[BadImage] = ()
    passed_over: Mapping[str, int] = {}
    fingerprint: str

    def say_passed_over(self, where: str | Path) -> None:
        if self.passed_over:
            endings = endings_line(self.passed_over)
            logger.info(f"{where}: passed over, not images by their names: {endings}")

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def source(self, index: int) -> Path | BinaryIO:
        """Image `index`: the path of its file, or a file opened."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages call image `index`; nothing is read for it."""

    def load(self, index: int, shorter_side: int = 0) -> Image.Image:
        """Image `index` through `load_image` and nothing else."""
        return load_image(self.source(index), shorter_side, self.name(index))

    def size_or_bad(self, index: int) -> tuple[int, int] | BadImage:
        """The two sides of image `index` in pixels, by its header alone, so perhaps turned; a
        marker where it cannot be read."""
        try:
            with _opened(self.source(index), self.name(index)) as image:
                return image.size
        except UnreadableImage as error:
            return error.bad

    @cached_property
    def _looked_at(self) -> list[tuple[tuple[int, int], str]]:
        """(the two sides, Pillow's mode) by the headers of at most LOOKED_AT images that have one,
        at even distances."""
        found = []
        for place in range(0, len(self), len(self) // LOOKED_AT + 1):
            with (
                contextlib.suppress(UnreadableImage),
                _opened(self.source(place), self.name(place)) as image,
            ):
                found.append((image.size, image.mode))
        return found

    @property
    def sizes_looked_at(self) -> list[tuple[int, int]]:
        """The two sides in pixels of a sample of at most LOOKED_AT images, perhaps turned."""
        return [size for size, _ in self._looked_at]

    def deep_grey(self) -> list[str]:
        """A sentence with the number of images whose white is guessed, of a sample."""
        looked_at = self._looked_at
        deep = sum(mode.startswith(DEEP_GREY) for _, mode in looked_at)
        if not deep:
            return []
        _said[0] = 1
        return [
            f"grey images of more than 8 bits or of floating point: {deep:,} of {len(looked_at):,} "
            "that were looked at; no file says which value is white, and it is taken from each "
            "image's largest one (docs/evaluation.md)"
        ]


class LabelledImages(StoredImages):
    """Image files with labels; what every data set of this project is.

    root: the folder that `paths` (relative posix strings) are relative to. labels: int64 [n], of
    each path an index into `classes` (names in the order of their numbers), or -1 where
    nothing is known.
    """

    def __init__(
        self,
        root: str | Path,
        paths: Iterable[str],
        labels: Sequence[int] | Tensor,
        classes: list[str],
    ) -> None:
        self.root, self.paths, self.classes = Path(root), Strings.of(paths), classes
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, index: int) -> Path:
        return self.root / self.paths[index]

    def name(self, index: int) -> str:
        return str(self.source(index))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images' paths, contents and labels, and of the classes.

        So a copy of a set is the same set, wherever it lies and whenever it was made.
        """
        labels = self.labels.tolist()
        return fingerprint_of([[*self.paths], self.digests(), labels, self.classes])

    def digests(self) -> list[str]:
        """What each file holds, as a hash; see datasets/contents.py."""
        return digests(self.root, [*self.paths])

    def subset(self, indices: Sequence[int] | Tensor) -> "LabelledImages":
        """The images at `indices`, in that order."""
        indices = torch.as_tensor(indices)
        paths = [self.paths[i] for i in indices.tolist()]
        return LabelledImages(self.root, paths, self.labels[indices], self.classes)


def fingerprint_of(facts: list) -> str:
    """What says whether two sets are the same, by plain data."""
    return CONTENTS + hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class ImageFolder(LabelledImages):
    """The files under `root` with the `image_endings`, at any depth, sorted by relative path.

    Where every image lies in a first-level subfolder, `classes` are the sorted names of those
    subfolders and `labels` index them; elsewhere `classes` is empty and every label is -1.
    Hidden files and folders and SYSTEM_FOLDERS are skipped, links are followed; a folder that
    cannot be listed is left out with a warning. A link that leads nowhere but has an image's name
    is an unreadable image. Raises `InputError` if there is no such folder or no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        folder = existing_folder(root)
        self.unlisted, self.passed_over = [], Counter()
        paths: list[str] = []
        self._find(str(folder), "", frozenset(), paths)
        paths.sort()
        for bad in self.unlisted:
            logger.warning(f"the images below {bad.path} are left out: {bad.reason}")
        if not paths:
            found = f", but {endings_line(self.passed_over)}" if self.passed_over else ""
            shards = ".tar" in self.passed_over
            hint = " (to pretrain from its tar shards, set DATA.DATASET shards)" if shards else ""
            raise InputError(
                f"the data folder {folder} holds no images{found}: put images in it or give "
                f"another folder{hint}"
            )
        self.say_passed_over(folder)
        firsts = [path.partition("/")[0] for path in paths if "/" in path]
        classes = sorted({*firsts}) if len(firsts) == len(paths) else []
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[name] for name in firsts] if classes else [-1] * len(paths)
        super().__init__(folder, paths, labels, classes)

    def _find(self, folder: str, prefix: str, above: frozenset[str], paths: list[str]) -> None:
        """Relative paths of the images below `folder` join `paths`; `above` breaks loops of links.

        Folders that cannot be listed join `unlisted`, endings of other files `passed_over`. No
        file is asked for more than the folder's own list says, but links.
        """
        real, wanted = os.path.realpath(folder), image_endings()
        if real in above:
            return
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        self.passed_over[HIDDEN] += 1
                        continue
                    dot = name.rfind(".")
                    ending = name[dot:].lower() if dot > 0 else ""
                    try:
                        is_folder = entry.is_dir()
                    # A link to itself, or into a folder that may not be entered.
                    except OSError as error:
                        is_folder = False
                        if ending not in wanted:
                            self.unlisted.append(_unlisted(entry.path, error))
                            continue
                    if is_folder and name in SYSTEM_FOLDERS:
                        self.passed_over[name] += 1
                    elif is_folder:
                        self._find(entry.path, f"{prefix}{name}/", above | {real}, paths)
                    elif ending in wanted:
                        paths.append(prefix + name)
                    else:
                        self.passed_over[ending] += 1
        except OSError as error:
            self.unlisted.append(_unlisted(folder, error))


@functools.cache
def image_endings() -> frozenset[str]:
    """Endings of the files that Pillow opens and decodes by itself: ".jpg" and so on."""
    endings = Image.registered_extensions().items()
    decoded = Image.OPEN.keys() - NOT_DECODED
    return frozenset({".mpo", *(ending for ending, kind in endings if kind in decoded)})


def endings_line(endings: Mapping[str, int]) -> str:
    """Numbers of files by their endings, the most first."""
    most = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {ending or 'without an ending'}" for ending, count in most[:ENDINGS_SHOWN]]
    rest = sum(count for _, count in most[ENDINGS_SHOWN:])
    return ", ".join(shown + ([f"{rest:,} others"] if rest else []))


def refuse_among_images(output: Path, *sets: StoredImages) -> None:
    """Raise InputError where what is written to `output` would be taken for images of these."""
    for images in sets:
        if isinstance(images, LabelledImages):
            inner, outer = (Path(os.path.realpath(path)) for path in (output, images.root))
            hidden = any(part.startswith(".") for part in inner.parts[len(outer.parts) :])
            if inner.is_relative_to(outer) and not hidden:
                raise InputError(
                    f"{output} lies in {images.root}, the folder of images, where its pictures "
                    "would be taken for some of them: choose a folder outside of it"
                )


def existing_folder(root: str | Path) -> Path:
    """The folder named `root`; raises `InputError` where there is none."""
    if not str(root):
        raise InputError("no data folder is named: give the path of a folder of images")
    folder = Path(root).expanduser()
    try:
        os.scandir(folder).close()
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        why = "does not exist" if absent else f"cannot be read ({error.strerror})"
        raise InputError(f"the data folder {folder} {why}: give one with images") from None
    return folder


def _unlisted(folder: str, error: OSError) -> BadImage:
    return BadImage(folder, f"a folder that cannot be listed: {_reason(error)}")
