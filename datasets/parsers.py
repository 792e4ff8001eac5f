"""What the metadata of each fine-grained benchmark lists; no image is opened.

Every reader takes the benchmark's official folder and gives a `Listing`. Where a benchmark has
an official validation split, training is train + val. Broken metadata raise exceptions of any
kind, of which `Benchmark` makes one sentence; that all images are there is checked there too.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.datasets import FGVCAircraft, Flowers102, StanfordCars

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
    paths, labels, splits, names = (
        _by_key(folder / f"{name}.txt")
        for name in ("images", "image_class_labels", "train_test_split", "classes")
    )
    if not paths.keys() == labels.keys() == splits.keys():
        raise ValueError(
            "images.txt, image_class_labels.txt and train_test_split.txt list different images"
        )
    used = set(labels.values())
    number = {label: index for index, label in enumerate(key for key in names if key in used)}
    rows: dict[str, Rows] = {"1": [], "0": []}
    for image, path in paths.items():
        rows[splits[image]].append((f"images/{path}", number[labels[image]]))
    return Listing([names[label] for label in number], rows["1"], rows["0"])


def _by_key(file: Path) -> dict[str, str]:
    """A text file of lines 'key value': the values, which may hold spaces, by key, in order."""
    values: dict[str, str] = {}
    for key, value in _fields(file, 2):
        if key in values:
            raise ValueError(f"{file.name} has two lines for '{key}'")
        values[key] = value
    return values


def _fields(file: Path, count: int) -> list[list[str]]:
    """The fields of each line that is not blank; the last field is the rest of the line."""
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip().split(maxsplit=count - 1) for line in text.split("\n") if line.strip()]
    for fields in lines:
        if len(fields) < count:
            raise ValueError(f"{file.name} has the line '{' '.join(fields)}'")
    return lines


def read_pets(folder: Path) -> Listing:
    """Oxford-IIIT Pet; a class is named as its files are, in torchvision's spelling.

    torchvision's reader decodes every image it is asked for; the metadata are a text file.
    """
    names: dict[int, str] = {}
    splits = []
    for split in ("trainval", "test"):
        rows = []
        for image, label, _, _ in _fields(folder / "annotations" / f"{split}.txt", 4):
            name = image.rpartition("_")[0].replace("_", " ").title()
            if names.setdefault(int(label), name) != name:
                raise ValueError(f"class {label} is both '{names[int(label)]}' and '{name}'")
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
    return Listing(list(Flowers102.classes), *splits)


def read_cars(folder: Path) -> Listing:
    """Stanford Cars, by torchvision's reader."""
    return _by_torchvision(folder, "stanford_cars", StanfordCars, ("train", "test"))


def read_aircraft(folder: Path) -> Listing:
    """FGVC-Aircraft at the level of variants, by torchvision's reader."""
    return _by_torchvision(folder, "fgvc-aircraft-2013b", FGVCAircraft, ("trainval", "test"))


def _by_torchvision(
    folder: Path, name: str, reader: Callable[..., Any], splits: tuple[str, str]
) -> Listing:
    """Both splits as torchvision lists them; it looks for a folder called `name`."""
    listed = []
    with tempfile.TemporaryDirectory() as parent:
        link = Path(parent, name)
        link.symlink_to(folder)
        for split in splits:
            images = reader(parent, split=split, loader=str)  # paths in the place of images
            items = [images[index] for index in range(len(images))]
            listed.append([(Path(p).relative_to(link).as_posix(), int(n)) for p, n in items])
    return Listing(list(images.classes), *listed)
