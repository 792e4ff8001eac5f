"""What the metadata of each fine-grained benchmark lists; no image is opened.

Every reader takes the benchmark's official folder and gives a `Listing`. Where a benchmark has
an official validation split, training is train + val. A reader raises `InputError` where the
metadata are broken; that all files are there is checked elsewhere.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.datasets import FGVCAircraft, Flowers102, StanfordCars

from utils.errors import InputError

Rows = list[tuple[str, int]]  # (image file, index of its class), in the official order


class Listing(NamedTuple):
    """classes: names in the order of their numbers. Files are posix, relative to the folder."""

    classes: list[str]
    train: Rows
    test: Rows


def read_listed_images(folder: Path) -> Listing:
    """CUB-200-2011 and NABirds: images, labels, split and class names in one file each.

    The classes are those that occur, in the order of classes.txt: NABirds lists the inner
    nodes of its hierarchy there too.
    """
    paths = _Column(folder / "images.txt")
    labels, sides = (
        _Column(folder / name, keys=paths)
        for name in ("image_class_labels.txt", "train_test_split.txt")
    )
    names = _Column(folder / "classes.txt")
    for image, label in labels.items():
        if label not in names:
            raise labels.error(image, f"there is no class '{label}' in {names.file.name}")
        if sides[image] not in ("0", "1"):
            raise sides.error(image, f"'{sides[image]}' should be 1 (training) or 0 (test)")
    used = set(labels.values())
    number = {label: index for index, label in enumerate(key for key in names if key in used)}
    splits: dict[str, Rows] = {"1": [], "0": []}
    for image, path in paths.items():
        splits[sides[image]].append((f"images/{path}", number[labels[image]]))
    return Listing([names[label] for label in number], splits["1"], splits["0"])


class _Column(dict[str, str]):
    """A text file of lines 'key value': the values, which may hold spaces, by key, in order.

    keys: the keys that the file must have, no more and no fewer.
    Raises InputError naming the file, and the line where one is to blame.
    """

    def __init__(self, file: Path, keys: "_Column | None" = None) -> None:
        super().__init__()
        self.file = file
        self.line: dict[str, int] = {}
        for line, (key, value) in _fields(file, 2):
            if key in self:
                raise _line_error(file, line, f"'{key}' stands in line {self.line[key]} already")
            self[key], self.line[key] = value, line
        if keys is None:
            return
        for key in self.keys() - keys.keys():
            raise self.error(key, f"there is no image '{key}' in {keys.file.name}")
        for key in keys.keys() - self.keys():
            raise keys.error(key, f"image '{key}' has no line in {file.name}")

    def error(self, key: str, text: str) -> InputError:
        return _line_error(self.file, self.line[key], text)


def _fields(file: Path, count: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each line that is not blank; the last field is the rest."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): restore it") from error
    for line, content in enumerate(text.split("\n"), start=1):
        fields = content.strip().split(maxsplit=count - 1)
        if not fields:
            continue
        if len(fields) < count:
            raise _line_error(file, line, f"it has {len(fields)} of {count} fields")
        yield line, fields


def _line_error(file: Path, line: int, text: str) -> InputError:
    return InputError(f"{file}, line {line}: {text}; restore the official file")


def read_pets(folder: Path) -> Listing:
    """Oxford-IIIT Pet; a class is named as its files are, in torchvision's spelling.

    torchvision's reader decodes every image it is asked for; the metadata are a text file.
    """
    names: dict[int, str] = {}
    splits = []
    for split in ("trainval", "test"):
        file, rows = folder / "annotations" / f"{split}.txt", []
        for line, (image, label, _, _) in _fields(file, 4):
            if not label.isdecimal():
                raise _line_error(file, line, f"'{label}' is not the number of a class")
            name = image.rpartition("_")[0].replace("_", " ").title()
            if names.setdefault(int(label), name) != name:
                raise _line_error(
                    file,
                    line,
                    f"class {label} is '{name}' here and '{names[int(label)]}' elsewhere",
                )
            rows.append((f"images/{image}.jpg", int(label)))
        splits.append(rows)
    number = {label: index for index, label in enumerate(sorted(names))}
    train, test = ([(path, number[label]) for path, label in rows] for rows in splits)
    return Listing([names[label] for label in number], train, test)


def read_flowers(folder: Path) -> Listing:
    """Oxford Flowers-102, by image number; training is trnid + valid.

    Read from the .mat files: torchvision's reader takes no files but those whose hash it
    knows, so that it could be tested on the whole data set only.
    """
    classes = list(Flowers102.classes)

    def read() -> Listing:
        # Imported here: pretraining on other data has no need of it.
        from scipy.io import loadmat

        labels = loadmat(folder / "imagelabels.mat")["labels"].ravel().tolist()
        ids = loadmat(folder / "setid.mat")
        splits = []
        for keys in (("trnid", "valid"), ("tstid",)):
            images = sorted(int(image) for key in keys for image in ids[key].ravel())
            if images and not 1 <= images[0] <= images[-1] <= len(labels):
                raise ValueError(f"setid.mat names images beyond the {len(labels)} labelled ones")
            splits.append([(f"jpg/image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in images])
        return Listing(classes, *splits)

    return _guarded(folder, read)


def read_cars(folder: Path) -> Listing:
    """Stanford Cars, by torchvision's reader."""
    return _by_torchvision(folder, "stanford_cars", StanfordCars, ("train", "test"))


def read_aircraft(folder: Path) -> Listing:
    """FGVC-Aircraft at the level of variants, by torchvision's reader."""
    splits = ("trainval", "test")
    return _by_torchvision(
        folder, "fgvc-aircraft-2013b", FGVCAircraft, splits, annotation_level="variant"
    )


def _by_torchvision(
    folder: Path, name: str, reader: Callable[..., Any], splits: tuple[str, str], **options: str
) -> Listing:
    """Both splits as torchvision lists them; `loader=str` gives paths in place of images.

    name: of the folder, which torchvision adds to the path itself.
    """
    if folder.name != name:
        raise InputError(f"{folder} must be named {name}: rename it or make a link to it")

    def read() -> Listing:
        both = [reader(folder.parent, split=split, loader=str, **options) for split in splits]
        train, test = (
            [
                (Path(path).relative_to(folder).as_posix(), int(label))
                for path, label in map(images.__getitem__, range(len(images)))
            ]
            for images in both
        )
        return Listing(list(both[0].classes), train, test)

    return _guarded(folder, read)


def _guarded(folder: Path, read: Callable[[], Listing]) -> Listing:
    """The listing with every label checked."""
    try:
        listing = read()
        for path, label in listing.train + listing.test:
            if not 0 <= label < len(listing.classes):
                raise ValueError(
                    f"{path} has class {label + 1}, there are {len(listing.classes)} classes"
                )
    # SciPy and torchvision meet broken files with exceptions of every kind.
    except Exception as error:
        text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        reason = (text or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"the metadata in {folder} cannot be read ({reason}): restore the official files"
        ) from error
    return listing
