"""Official splits of the fine-grained benchmarks, checked against what is there."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets.folder import SYSTEM_FOLDERS, LabelledImages, existing_folder
from datasets.parsers import Listing, Places, Rows
from datasets.splits import Splits, contents_in_words
from utils.errors import InputError

_DEPTH = 3  # folders below the one that is named in which a benchmark's pieces are looked for


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
        missing = {path: None for path in listed if not os.path.isfile(f"{folder}/{path}")}
        train, test = ([row for row in rows if row[0] not in missing] for rows in splits)
        notes = []
        if missing:
            first = next(iter(missing))
            notes.append(
                f"{name} in {folder} lacks {len(missing):,} of the {len(listed):,} images that it "
                f"lists (the first is {first})"
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
        found, lacking = {}, []
        for layout in self.layouts:
            pieces = layout.training + (layout.evaluation if evaluated else ())
            places = {piece: _find(inner, root, piece) for piece in pieces}
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
            f"{contents_in_words(inner)}. Of what {what} needs, {', '.join(found) or 'nothing'} is "
            f"there; {', or else '.join(lacking)} is missing. {self.source}{once}"
            + ("" if evaluated else "; DATA.DATASET folder pretrains on any folder of images")
        )


def _find(inner: Path, root: Path, name: str) -> Path | None:
    """The first file or folder of this name below `inner`, else `root`, or `root` itself.

    The least deep is first. A folder in a folder of the same name, to which some archives unpack,
    is taken instead.
    """
    places = (
        place
        for folder in (inner, root)
        for depth in range(_DEPTH + 1)
        for place in sorted(folder.glob("*/" * depth + name))
        for above in [place.relative_to(folder).parts[:-1]]
        if not any(part[0] == "." or part in SYSTEM_FOLDERS for part in above)
    )
    place = next(places, root if root.name == name else None)
    while place is not None and (place / name).is_dir():
        place = place / name
    return place


def _listing(layout: Layout, places: Places, folder: Path) -> tuple[list[str], Rows, Rows]:
    """Classes, training and test files, relative to the folder, as the metadata list them."""
    try:
        classes, train, test = layout.read(places)
        train, test = (
            [(os.path.relpath(path, folder), label) for path, label in rows]
            for rows in (train, test)
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


def _absolute(root: str | Path) -> Path:
    return Path(os.path.abspath(Path(root).expanduser()))


def _reason(error: Exception) -> str:
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return (text or type(error).__name__).splitlines()[0].rstrip(".")
