"""Train and test splits: of the fine-grained benchmarks, checked, and of a folder of folders."""

import difflib
import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets.folder import SYSTEM_FOLDERS, ImageFolder, LabelledImages, existing_folder
from datasets.parsers import Listing
from utils.errors import InputError

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


class Counts(NamedTuple):
    """Numbers of classes and of images of each split."""

    classes: int
    training: int
    test: int


@dataclass(frozen=True)
class Benchmark:
    """A data set with official splits.

    folder: its name once unpacked. files: what must be in it, files and folders. read: the
    reader of its metadata. counts: what the official splits hold. source: for the user, how it
    can be had. fetch: called with (root, download=True), puts the folder into `root` unless
    it is there; None where nothing can.
    """

    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], Listing]
    counts: Counts
    source: str
    fetch: Callable[..., Any] | None = None

    def download(self, name: str, root: str | Path) -> None:
        """Put the official folder into `root`, unless it is there; InputError where it fails."""
        root = _absolute(root)
        if self._is_whole(self._folder(root)):
            return
        if self.fetch is None:
            raise self._not_found(name, root)
        parent = root.parent if root.name == self.folder else root
        try:
            self.fetch(parent, download=True)
        # Network, disk and archive each fail in their own ways.
        except Exception as error:
            raise InputError(
                f"{name} could not be downloaded to {parent} ({_reason(error)}): remove what it "
                f"left there and try again, or put the official folder {self.folder} there yourself"
            ) from error

    def splits(self, name: str, root: str | Path, partial: bool) -> Splits:
        """The splits in `root`, which holds the official folder or is it.

        Raises InputError where the metadata are missing or broken, where a split has no images,
        and, unless `partial`, where listed images are missing or the numbers are not the official
        ones. Images that are missing are left out.
        """
        root = existing_folder(_absolute(root))
        folder = self._folder(root)
        if not self._is_whole(folder):
            raise self._not_found(name, root)
        classes, *splits = self._listing(folder)
        listed = [path for rows in splits for path, _ in rows]
        missing = [path for path in listed if not (folder / path).is_file()]
        notes = []
        if missing:
            notes.append(
                f"{name} in {folder} lacks {len(missing):,} of the {len(listed):,} images that it "
                f"lists (the first is {missing[0]}{_elsewhere(folder, missing[0], listed)})"
            )
        absent = set(missing)
        train, test = ([row for row in rows if row[0] not in absent] for rows in splits)
        found = Counts(len(classes), len(train), len(test))
        if found != self.counts:
            notes.append(
                f"{name} in {root} has {found.classes:,} classes, {found.training:,} training and "
                f"{found.test:,} test images; the official data set has {self.counts.classes:,}, "
                f"{self.counts.training:,} and {self.counts.test:,}"
            )
        if not (train and test):
            remedy = "put the images where it lists them" if missing else "restore its metadata"
            raise InputError(f"{'; '.join(notes)}: {remedy}")
        if notes and not partial:
            raise InputError(
                f"{notes[0]}: complete it, or set DATA.PARTIAL true to use what is there"
            )
        train, test = (
            LabelledImages(folder, [p for p, _ in rows], [n for _, n in rows], classes)
            for rows in (train, test)
        )
        return Splits(name, train, test, notes)

    def _listing(self, folder: Path) -> Listing:
        """What the metadata list, checked."""
        try:
            listing = self.read(folder)
            for path, label in listing.train + listing.test:
                if not 0 <= label < len(listing.classes):
                    raise ValueError(
                        f"{path} has class {label + 1}, there are {len(listing.classes)} classes"
                    )
            both = {path for path, _ in listing.train} & {path for path, _ in listing.test}
            if both:
                raise ValueError(f"{min(both)} is listed for training and for test")
        # Readers meet broken files with exceptions of every kind.
        except Exception as error:
            raise InputError(
                f"the metadata in {folder} cannot be read ({_reason(error)}): restore the official "
                "files"
            ) from error
        return listing

    def _folder(self, root: Path) -> Path:
        inner = root / self.folder
        return inner if inner.is_dir() else root

    def _is_whole(self, folder: Path) -> bool:
        return all((folder / file).exists() for file in self.files)

    def _not_found(self, name: str, root: Path) -> InputError:
        return InputError(
            f"{name} was not found in {root}: expected {self.folder} in it, or this folder itself, "
            f"with {', '.join(self.files)}. {self.source}"
        )


def _elsewhere(folder: Path, path: str, listed: list[str]) -> str:
    """Where below a folder a file of this name lies that is not listed, in words; else empty."""
    places = (str(found.relative_to(folder)) for found in folder.rglob(Path(path).name))
    place = next((place for place in places if place not in listed), None)
    return f", but one of its name is at {place}" if place else ""


def _absolute(root: str | Path) -> Path:
    return Path(os.path.abspath(Path(root).expanduser()))


def _reason(error: Exception) -> str:
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return (text or type(error).__name__).splitlines()[0].rstrip(".")


def folder_splits(name: str, root: str | Path) -> Splits:
    """ROOT/train and ROOT/val, or else ROOT/test, one subfolder a class; numbered by train's.

    Raises InputError where a split is missing, has images outside class subfolders, or the
    second has a class that the first lacks.
    """
    folder = existing_folder(root)
    present = [split for split in ("val", "test") if (folder / split).is_dir()]
    if not (folder / "train").is_dir() or not present:
        raise InputError(
            f"{folder} has no {'val or test' if (folder / 'train').is_dir() else 'train'} folder: "
            f"expected train and val (or test) in it, each with one subfolder for each class; it "
            f"holds {_few(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}"
        )
    splits = paired_folders(name, folder / "train", folder / present[0])
    if len(present) > 1:
        splits.notes.append(f"{folder} has both val and test: val is used")
    return splits


def paired_folders(name: str, train: str | Path, test: str | Path) -> Splits:
    """Two folders as splits, one subfolder a class, numbered by those of `train`.

    Names are the same where their composed Unicode is, for macOS stores letters decomposed.
    Raises InputError where a folder has images outside class subfolders, or two of one name, and
    where the second has a class that the first lacks.
    """
    first, second = _labelled_folder(train), _labelled_folder(test)
    known, others = _by_composed_name(first), _by_composed_name(second)
    unknown = [others[label] for label in others if label not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], first.classes, n=1, cutoff=0.8)
        raise InputError(
            f"{second.root} has classes that {first.root} lacks: {_few(unknown)}. Both must use "
            "the same names for their class subfolders"
            + "".join(f"; {unknown[0]!a} there is nearest to {label!a} here" for label in near)
        )
    places = {label: place for place, label in enumerate(known)}
    number = {others[label]: places[label] for label in others}
    labels = [number[second.classes[label]] for label in second.labels]
    notes = []
    if len(known) == 1:
        notes.append(f"all images are of one class ({first.classes[0]}): every figure is 100 %")
    inside = {entry.name for entry in first.root.iterdir() if entry.is_dir()}
    if empty := sorted(n for n in inside - {*first.classes} - SYSTEM_FOLDERS if n[0] != "."):
        notes.append(
            f"{first.root} has subfolders without images, which are no classes: {len(empty):,} "
            f"({_few(empty)})"
        )
    if respelled := sorted(set(second.classes) - set(first.classes)):
        notes.append(
            f"class names of {second.root} in another Unicode form than those of {first.root}, "
            f"taken as the same: {len(respelled):,} ({_few(respelled)})"
        )
    if unseen := [known[label] for label in known if label not in others]:
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
            f"{images.root} has images outside class subfolders: an evaluation needs one "
            f"subfolder for each class; move or remove {_few(stray)}"
        )
    return images


def _by_composed_name(images: ImageFolder) -> dict[str, str]:
    """The classes by their names in composed Unicode, in their order; InputError for equal ones."""
    named: dict[str, str] = {}
    for label in images.classes:
        other = named.setdefault(unicodedata.normalize("NFC", label), label)
        if other != label:
            raise InputError(
                f"{images.root} has two class subfolders named {label}, in two Unicode forms "
                f"({other!a} and {label!a}): put their images into one"
            )
    return named


def _few(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
