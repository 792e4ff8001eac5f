"""Train and test splits: what a data set gives an evaluation, and those of a folder of folders."""

import contextlib
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from datasets.folder import SYSTEM_FOLDERS, ImageFolder, LabelledImages, existing_folder
from utils.errors import InputError

# Names of a folder's splits, the first that is there before the others.
TRAINING = ("train", "training", "trainval")
HELD_OUT = ("val", "validation", "valid", "test", "testing")
_NAMED = 5  # names of classes or entries in one message


@dataclass(frozen=True)
class Splits:
    """The two splits of a data set, without a transform, and lines that the user should read.

    `train.classes` and `test.classes` are the same. Where there is an official validation
    split, `train` is train + val, as in Kornblith et al. 2019 ("Do Better ImageNet Models
    Transfer Better?").
    """

    name: str
    train: LabelledImages
    test: LabelledImages
    notes: list[str]


def folder_splits(name: str, root: str | Path) -> Splits:
    """ROOT/train and ROOT/val, or else ROOT/test, one subfolder a class; numbered by train's.

    Other names: TRAINING and HELD_OUT, in capitals too. Raises InputError where a split is
    missing, has images outside class subfolders, or the second has a class that the first lacks.
    """
    folder = existing_folder(root)
    train, held_out = folders_named(folder, TRAINING), folders_named(folder, HELD_OUT)
    if not (train and held_out):
        raise InputError(
            f"{folder} has no {'val or test' if train else 'train'} folder: "
            f"expected train and val (or test) in it, each with one subfolder for each class; "
            f"{contents_in_words(folder)}"
        )
    splits = paired_folders(name, train[0], held_out[0])
    for found in (train, held_out):
        if len(found) > 1:
            names = [split.name for split in found]
            splits.notes.append(f"{folder} has {' and '.join(names)}: {names[0]} is used")
    return splits


def folders_named(folder: Path, names: Sequence[str]) -> list[Path]:
    """The subfolders of these names, whatever their capitals, in the names' order."""
    with contextlib.suppress(OSError):
        inside = [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
        return [entry for name in names for entry in inside if entry.name.lower() == name]
    return []


def paired_folders(name: str, train: str | Path, test: str | Path) -> Splits:
    """Two folders as splits, one subfolder a class, numbered by those of `train`.

    Raises InputError where a folder has images outside class subfolders, and where the second has
    a class that the first lacks.
    """
    first, second = _labelled_folder(train), _labelled_folder(test)
    number = {label: place for place, label in enumerate(first.classes)}
    if unknown := [label for label in second.classes if label not in number]:
        near = difflib.get_close_matches(unknown[0], first.classes, n=1, cutoff=0.8)
        raise InputError(
            f"{second.root} has classes that {first.root} lacks: {_few(unknown)}. Both must use "
            "the same names for their class subfolders"
            + "".join(f"; {unknown[0]!a} there is nearest to {label!a} here" for label in near)
        )
    labels = torch.tensor([number[label] for label in second.classes])[second.labels]
    notes = []
    if len(first.classes) == 1:
        notes.append(f"all images are of one class ({first.classes[0]}): every figure is 100 %")
    inside = {entry.name for entry in first.root.iterdir() if entry.is_dir()}
    if empty := sorted(n for n in inside - {*first.classes} - SYSTEM_FOLDERS if n[0] != "."):
        notes.append(
            f"{first.root} has subfolders without images, which are no classes: {len(empty):,} "
            f"({_few(empty)})"
        )
    if unseen := sorted({*first.classes} - {*second.classes}):
        notes.append(
            f"{second.root} has no images of {len(unseen):,} of the {len(first.classes):,} "
            f"classes: {_few(unseen)}"
        )
    second = LabelledImages(second.root, second.paths, labels, first.classes)
    return Splits(name, first, second, notes)


def _labelled_folder(root: str | Path) -> ImageFolder:
    """The images of a folder with class subfolders; InputError where some lie outside of them."""
    images = ImageFolder(root)
    if not images.classes:
        stray = [path for path in images.paths if "/" not in path]
        raise InputError(
            f"{images.root} has images outside class subfolders: an evaluation needs one subfolder "
            f"for each class; "
            + ("it has none" if len(stray) == len(images) else f"move or remove {_few(stray)}")
        )
    return images


def contents_in_words(folder: Path) -> str:
    """What a folder holds, or the first above it that exists."""
    while not folder.is_dir():
        folder = folder.parent
    return f"{folder} holds {_few(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}"


def _few(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
