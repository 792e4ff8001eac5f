"""Train and test splits: of the fine-grained benchmarks, checked, and of a folder of folders."""

import contextlib
import difflib
import functools
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from datasets.folder import SYSTEM_FOLDERS, ImageFolder, LabelledImages, existing_folder
from datasets.parsers import Listing, Places
from utils import distributed
from utils.errors import InputError

Rows = list[tuple[str, int]]  # (file, relative to a folder; index of its class)
# Names of a folder's splits, the first that is there before the others.
TRAINING = ("train", "training", "trainval")
HELD_OUT = ("val", "validation", "valid", "test", "testing")
LOOKED_FOR = 100  # images of a set, by each process that has not listed them itself
_NAMED = 5  # names of classes or entries in one message
_DEPTH = 3  # folders below the one that is named in which a benchmark's pieces are looked for


T = TypeVar("T")


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


def listed_once(find: Callable[[], T]) -> T:
    """What `find` gives, `LabelledImages` or `Splits`: the first process lists files, for all.

    All processes together. Raises InputError on all where `find` does, and where another process
    lacks one of LOOKED_FOR images of a set, at even distances.
    """
    found, lacking = distributed.on_main(find), None
    for images in (found.train, found.test) if isinstance(found, Splits) else (found,):
        names = map(images.name, range(0, len(images), len(images) // LOOKED_FOR + 1))
        lacking = lacking or next((name for name in names if not os.path.lexists(name)), None)
    for rank, name in enumerate(distributed.gather_objects(lacking)):
        if name is not None:
            raise InputError(
                f"process {rank} has no {name}, which process 0 has found: put the images where "
                "all of them see the same files"
            )
    return found


class Counts(NamedTuple):
    """Numbers of classes and of images of each split."""

    classes: int
    training: int
    test: int

    def __str__(self) -> str:
        if not self.classes:
            return f"{self.training:,} training images"
        return f"{self.classes:,} classes, {self.training:,} training and {self.test:,} test images"


class Layout(NamedTuple):
    """A form in which copies of a benchmark come: its files and folders, wherever in the copy.

    read: their places by name -> Listing. training: those that pretraining needs, the images
    first. evaluation: those that an evaluation needs besides. In a name, * is any text.
    """

    read: Callable[[Places], Listing]
    training: tuple[str, ...]
    evaluation: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """A data set with official splits.

    folder: its name once unpacked. layouts: the first of which all is there is read. counts: what
    the official splits hold. source: for the user, how it can be had. fetch: called with (root,
    download=True), puts the folder into `root` unless it is there; None where nothing can.
    """

    folder: str
    layouts: tuple[Layout, ...]
    counts: Counts
    source: str
    fetch: Callable[..., Any] | None = None

    def download(self, name: str, root: str | Path) -> None:
        """Put the official folder into `root`, unless all is there; InputError where it fails."""
        root = _absolute(root)
        with contextlib.suppress(InputError):
            self._places(name, root, evaluated=True)
            return
        if self.fetch is None:
            return  # what reads it says how it can be had
        parent = root.parent if root.name == self.folder else root
        try:
            self.fetch(parent, download=True)
        # Network, disk and archive each fail in their own ways.
        except Exception as error:
            raise InputError(
                f"{name} could not be downloaded to {parent} ({_reason(error)}): remove what it "
                f"left there and try again, or put the official folder {self.folder} there yourself"
            ) from error

    def splits(self, name: str, root: str | Path, partial: bool, evaluated: bool = True) -> Splits:
        """The splits in `root`, which holds the official folder or is it, or a common other form.

        Without `evaluated` the training images alone, without labels, are looked for and given.

        Raises InputError where the metadata are missing or broken, where a split has no images,
        and, unless `partial`, where listed images are missing or the numbers are not the official
        ones. Images that are missing are left out.
        """
        root = existing_folder(_absolute(root))
        layout, places = self._places(name, root, evaluated)
        folder = Path(os.path.commonpath([place.parent for place in places.values()]))
        classes, *splits = _listing(layout, places, folder)
        if not evaluated:
            classes, splits = [], [[(path, -1) for path, _ in splits[0]], []]
        listed = [path for rows in splits for path, _ in rows]
        missing = _missing(folder, listed)
        train, test = ([row for row in rows if row[0] not in missing] for rows in splits)
        notes = []
        if missing:
            first = next(iter(missing))
            notes.append(
                f"{name} in {folder} lacks {len(missing):,} of the {len(listed):,} images that it "
                f"lists (the first is {first}{_elsewhere(folder, first, listed)})"
            )
        found = Counts(len(classes), len(train), len(test))
        official = self.counts if evaluated else Counts(0, self.counts.training, 0)
        if found != official:
            notes.append(f"{name} in {folder} has {found}; the official data set has {official}")
        if not train or (evaluated and not test):
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

    def _places(self, name: str, root: Path, evaluated: bool) -> tuple[Layout, Places]:
        """The layout of which all is there, and where; InputError with what is found if none is."""
        inner = root / self.folder
        below = functools.cache(_subfolders)  # each folder is listed once for all pieces
        found, lacking = {}, []
        for layout in self.layouts:
            pieces = layout.training + (layout.evaluation if evaluated else ())
            places = {
                piece: _find(inner, piece, below) or _find(root, piece, below) for piece in pieces
            }
            if all(places.values()):
                return layout, places
            lacking.append(", ".join(piece for piece in pieces if not places[piece]))
            found |= {piece: None for piece in pieces if places[piece]}
        what = "an evaluation" if evaluated else "pretraining"
        place = root if root.name == self.folder else inner
        # What fetches does so only to where nothing is.
        once = f" once {place} is removed" if self.fetch and place.is_dir() else ""
        raise InputError(
            f"{name} was not found in {root}: expected {self.folder} in it, or this folder itself; "
            f"{_contents(inner)}. Of what {what} needs, {', '.join(found) or 'nothing'} is there; "
            f"{', or else '.join(lacking)} is missing. {self.source}{once}"
            + ("" if evaluated else "; DATA.DATASET folder pretrains on any folder of images")
        )


def _missing(folder: Path, listed: list[str]) -> dict[str, None]:
    """Of relative paths those that are no files; each subfolder is listed once, for all in it."""
    files, missing = functools.cache(_files), {}
    for path in listed:
        inner, _, name = path.rpartition("/")
        # A file system may take it under another spelling.
        if name not in files(f"{folder}/{inner}") and not os.path.isfile(f"{folder}/{path}"):
            missing[path] = None
    return missing


def _files(folder: str) -> set[str]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}
    return set()


def _elsewhere(folder: Path, path: str, listed: list[str]) -> str:
    """Where below a folder a file of this name lies that is not listed, in words; else empty."""
    places = (str(found.relative_to(folder)) for found in folder.rglob(Path(path).name))
    place = next((place for place in places if place not in listed), None)
    return f", but one of its name is at {place}" if place else ""


def _find(root: Path, name: str, below: Callable[[Path], list[Path]]) -> Path | None:
    """The file or folder of this name below `root`, of several the least deep, or `root` itself.

    A folder in a folder of the same name, to which some archives unpack, is taken instead.
    below: folder -> its subfolders.
    """
    places = (place for folder in _folders(root, below) for place in sorted(folder.glob(name)))
    place = next(places, root if root.name == name else None)
    while place is not None and (place / name).is_dir():
        place = place / name
    return place


def _folders(root: Path, below: Callable[[Path], list[Path]]) -> Iterator[Path]:
    """`root` and the folders below it down to _DEPTH, the least deep first."""
    level = [root]
    for _ in range(_DEPTH):
        yield from level
        level = [inner for folder in level for inner in below(folder)]
    yield from level


def _subfolders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
        return [folder / name for name in sorted(names) if name not in SYSTEM_FOLDERS]
    return []


def _contents(folder: Path) -> str:
    """What a folder holds, or the first above it that exists."""
    while not folder.is_dir():
        folder = folder.parent
    return f"{folder} holds {_few(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}"


def _listing(layout: Layout, places: Places, folder: Path) -> tuple[list[str], Rows, Rows]:
    """Classes, training and test files, relative to the folder, as the metadata list them."""
    try:
        classes, train, test = layout.read(places)
        train, test = (
            [(_below(folder, path), label) for path, label in rows] for rows in (train, test)
        )
        for path, label in train + test:
            if classes and not 0 <= label < len(classes):
                raise ValueError(f"{path} has class {label + 1}, there are {len(classes)} classes")
        both = {path for path, _ in train} & {path for path, _ in test}
        if both:
            raise ValueError(f"{min(both)} is listed for training and for test")
    except InputError:
        raise
    # Readers meet broken files with exceptions of every kind.
    except Exception as error:
        raise InputError(
            f"the metadata in {folder} cannot be read ({_reason(error)}): restore the official "
            "files"
        ) from error
    return classes, train, test


def _below(folder: Path, path: str) -> str:
    """A path relative to a folder, as pathlib writes it, which costs ten times as much."""
    start = f"{folder}/"
    if path.startswith(start) and not ("//" in path or "/." in path or path.endswith("/")):
        return path[len(start) :]
    return Path(path).relative_to(folder).as_posix()


def _absolute(root: str | Path) -> Path:
    return Path(os.path.abspath(Path(root).expanduser()))


def _reason(error: Exception) -> str:
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return (text or type(error).__name__).splitlines()[0].rstrip(".")


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
            f"{_contents(folder)}"
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
    labels = torch.tensor([number[label] for label in second.classes])[second.labels]
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
            f"{images.root} has images outside class subfolders: an evaluation needs one subfolder "
            f"for each class; "
            + ("it has none" if len(stray) == len(images) else f"move or remove {_few(stray)}")
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
