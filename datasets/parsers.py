"""What the metadata of each fine-grained benchmark lists; no image is opened.

A reader is given the places of a copy's pieces, by the names that its `Layout` has for them, and
gives a `Listing`; of those alone that pretraining needs, the training images. Where there is an
official validation split, training is train + val. Broken metadata raise exceptions of any kind.
"""

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision.datasets import Flowers102

from datasets.folder import ImageFolder

Places = dict[str, Path]
Rows = list[tuple[str, int]]  # (path of an image file, index of its class), in official order


class Listing(NamedTuple):
    """classes: names in the order of their numbers; where there are none, labels mean nothing."""

    classes: list[str]
    train: Rows
    test: Rows


def read_listed_images(places: Places) -> Listing:
    """CUB-200-2011 and NABirds: images, labels, split and class names in one file each.

    The classes are those that occur, in the order of classes.txt: NABirds lists the inner
    nodes of its hierarchy there too.
    """
    lists = {name: _by_key(file) for name, file in places.items() if name.endswith(".txt")}
    names = lists.pop("classes.txt", {})
    paths, splits = lists["images.txt"], lists["train_test_split.txt"]
    if any(listed.keys() != paths.keys() for listed in lists.values()):
        raise ValueError(f"{', '.join(lists)} list different images")
    labels = lists.get("image_class_labels.txt", {})
    used = set(labels.values())
    number = {label: index for index, label in enumerate(key for key in names if key in used)}
    folder, rows = str(places["images"]), {"1": [], "0": []}
    for image, path in paths.items():
        label = number[labels[image]] if labels else -1
        rows[splits[image]].append((os.path.join(folder, path), label))
    return Listing([names[label] for label in number], rows["1"], rows["0"])


def _by_key(file: Path) -> dict[str, str]:
    """A text file of lines 'key value': the values, which may hold spaces, by key, in order."""
    values: dict[str, str] = {}
    for key, value in _fields(file, 2):
        if key in values:
            raise ValueError(f"{file.name} has two lines for '{key}'")
        values[key] = value
    return values


def _fields(file: Path, count: int) -> Iterator[list[str]]:
    """The fields of each line that is not blank; the last field is the rest of the line.

    Editors on Windows end lines otherwise and put a byte order mark first: both are left out.
    """
    data = file.read_bytes()
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if utf_16 else "utf-8-sig", errors="replace")
    for fields in (line.strip().split(maxsplit=count - 1) for line in text.split("\n")):
        if 0 < len(fields) < count:
            raise ValueError(f"{file.name} has the line '{' '.join(fields)}'")
        if fields:
            yield fields


def read_pets(places: Places) -> Listing:
    """Oxford-IIIT Pet; a class is named as its files are, in torchvision's spelling.

    torchvision's reader decodes every image it is asked for; the metadata are a text file.
    """
    names: dict[int, str] = {}
    splits = []
    for file in ("trainval.txt", "test.txt"):
        rows = []
        for image, label, _, _ in _fields(places[file], 4) if file in places else []:
            name = image.rpartition("_")[0].replace("_", " ").title()
            if names.setdefault(int(label), name) != name:
                raise ValueError(f"class {label} is both '{names[int(label)]}' and '{name}'")
            rows.append((f"{places['images']}/{image}.jpg", int(label)))
        splits.append(rows)
    number = {label: index for index, label in enumerate(sorted(names))}
    train, test = ([(path, number[label]) for path, label in rows] for rows in splits)
    return Listing([names[label] for label in number], train, test)


def read_flowers(places: Places) -> Listing:
    """Oxford Flowers-102, by image number; training is trnid + valid.

    torchvision's reader takes no files but those whose hash it knows, so that it could be tested
    on the whole data set only.
    """
    ids, labels = _mat(places["setid.mat"]), None
    if "imagelabels.mat" in places:
        labels = _mat(places["imagelabels.mat"])["labels"].tolist()
    splits = []
    for keys in (("trnid", "valid"), ("tstid",)):
        images = sorted(int(image) for key in keys for image in np.atleast_1d(ids[key]))
        if labels and images and not 1 <= images[0] <= images[-1] <= len(labels):
            raise ValueError(f"setid.mat names images beyond the {len(labels)} labelled ones")
        splits.append(
            [
                (f"{places['jpg']}/image_{i:05d}.jpg", int(labels[i - 1]) - 1 if labels else -1)
                for i in images
            ]
        )
    return Listing(list(Flowers102.classes) if labels else [], *splits)


def read_cars(places: Places) -> Listing:
    """Stanford Cars with a folder for each split: all that is in cars_train is for training."""
    if "cars_meta.mat" not in places:
        folder = ImageFolder(places["cars_train"])
        return Listing([], [(f"{folder.root}/{path}", -1) for path in folder.paths], [])
    splits = []
    for folder, file in (
        ("cars_train", "cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels*.mat"),
    ):
        rows = np.atleast_1d(_mat(places[file])["annotations"])
        splits.append([(f"{places[folder]}/{row['fname']}", int(row["class"]) - 1) for row in rows])
    return Listing(_mat(places["cars_meta.mat"])["class_names"].tolist(), *splits)


def read_cars_in_one_folder(places: Places) -> Listing:
    """Stanford Cars in its first form, with all images in one folder and one file for the rest.

    Its images have other numbers than those of the other form.
    """
    content = _mat(places["cars_annos.mat"])
    splits: tuple[Rows, Rows] = ([], [])
    for row in np.atleast_1d(content["annotations"]):
        image = f"{places['car_ims']}/{Path(row['relative_im_path']).name}"
        splits[row["test"]].append((image, int(row["class"]) - 1))
    return Listing(content["class_names"].tolist(), *splits)


def _mat(file: Path) -> dict[str, Any]:
    # Imported here: pretraining on other data has no need of it.
    from scipy.io import loadmat

    return loadmat(file, squeeze_me=True)


def read_aircraft(places: Places) -> Listing:
    """FGVC-Aircraft at the level of variants."""
    classes, splits = [], []
    if "variants.txt" in places:
        classes = [name for (name,) in _fields(places["variants.txt"], 1)]
    number = {name: index for index, name in enumerate(classes)}
    for split in ("trainval", "test"):
        file = places.get(f"images_variant_{split}.txt")
        splits.append(
            [
                (f"{places['images']}/{image}.jpg", number[name] if classes else -1)
                for image, name in (_fields(file, 2) if file else [])
            ]
        )
    return Listing(classes, *splits)
