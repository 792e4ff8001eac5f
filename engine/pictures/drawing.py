"""What all pictures share: one look, sheets of small pictures, names that fit, PNG files."""

import re
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from utils.errors import InputError
from utils.files import replacing

DPI = 100
LARGEST = 60_000  # pixels a side; matplotlib draws fewer than 2^16, margins among them
RIGHT, WRONG = "#1a9641", "#d7191c"
# DejaVu, matplotlib's own font, has no Chinese, Japanese or Korean.
_FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans", "Microsoft YaHei")
_INSTALLED = {font.name for font in fontManager.ttflist}
# Decorates every function that draws. Names of files and classes are no mathematics.
LOOK = matplotlib.rc_context(
    {
        "text.parse_math": False,
        "font.family": ["sans-serif", *(name for name in _FALLBACK_FONTS if name in _INSTALLED)],
    }
)


@dataclass(frozen=True)
class Picture:
    """A figure and what a page says of it.

    caption: how to read it. columns: small pictures side by side; on narrow screens a page
    scrolls rather than making them too small.
    """

    title: str
    figure: Figure
    caption: str = ""
    columns: int = 1


def sheet(
    rows: int,
    columns: int,
    cell: tuple[float, float],
    titles: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> tuple[Figure, np.ndarray]:
    """A grid of small pictures: the figure and its empty axes [rows, columns].

    cell: width and height of each in inches, about. titles: over the columns; labels: beside
    the rows.
    """
    size = (columns * (cell[0] + 0.1) + 0.4, rows * (cell[1] + 0.2) + 0.6)
    figure = Figure(figsize=size, dpi=DPI, layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], titles, strict=bool(titles)):
        axis.set_title(title, fontsize=10)
    for axis, label in zip(axes[:, 0], labels, strict=bool(labels)):
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=14, weight="bold")
    return figure, axes


def evenly(total: int, most: int) -> list[int]:
    """Which of `total` things are shown, at most `most` of them, spread evenly."""
    places = np.linspace(0, total - 1, min(most, total)).round()
    return places.astype(int).tolist()


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG; InputError where it cannot be written."""
    width, height = (round(inches * DPI) for inches in figure.get_size_inches())
    if max(width, height) > LARGEST:
        raise InputError(
            f"the picture {path} would have {width} x {height} pixels, and more than {LARGEST} a "
            f"side cannot be drawn: show fewer images."
        )
    with replacing(path, "picture") as temporary, warnings.catch_warnings():
        # A letter that no font has is drawn as a box; a line on stderr for each helps nobody.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight")


def readable(name: str) -> str:
    """A class name as shown: CUB's numbers off, underscores as spaces."""
    return re.sub(r"^\d+\.(?=\D)", "", name).replace("_", " ").strip() or name


def short(name: str, columns: int) -> str:
    """A class name on one line of `columns` letters.

    The middle is cut out, since fine-grained names differ at either end.
    """
    name = printable(" ".join(readable(name).split()))
    most = _fitting(name, columns)
    if len(name) <= most:
        return name
    return name[: most // 2].rstrip() + "…" + name[len(name) - (most - most // 2 - 1) :].lstrip()


def wrapped(text: str, columns: int, lines: int) -> str:
    """Text on at most `lines` lines of `columns` letters, the rest cut off."""
    pieces = textwrap.wrap(text, _fitting(text, columns), max_lines=lines, placeholder="…")
    return printable("\n".join(pieces))


def printable(text: str) -> str:
    """Names of files that are not UTF-8 hold letters that no font takes."""
    return text.encode("utf-8", "replace").decode()


def _fitting(text: str, columns: int) -> int:
    """How many letters of `text` fit where `columns` narrow ones do."""
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return max(columns // (2 if wide else 1), 2)
