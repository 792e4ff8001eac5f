"""Maps drawn over images, and the sheets of small pictures that hold them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from utils.files import replacing

DPI = 100
CELL, GAP, EDGE, TITLES = 200, 6, 26, 30  # pixels of a sheet; EDGE on the left, TITLES on top


@dataclass(frozen=True)
class Place:
    """Where a view was cut out of an image, in pixels, and whether it was then flipped."""

    left: float
    top: float
    width: float
    height: float
    flipped: bool = False

    def to_image(self, points: Tensor) -> Tensor:
        """Points [n, 2] in the view (x, y as shares of its sides) -> pixels of the image."""
        x, y = points.unbind(-1)
        x = 1 - x if self.flipped else x
        return torch.stack([self.left + x * self.width, self.top + y * self.height], dim=-1)

    def to_view(self, points: Tensor) -> Tensor:
        """The inverse of `to_image`; outside the view shares are below 0 or above 1."""
        x = (points[..., 0] - self.left) / self.width
        y = (points[..., 1] - self.top) / self.height
        return torch.stack([1 - x if self.flipped else x, y], dim=-1)


def whole(image: Image.Image) -> Place:
    return Place(0, 0, image.width, image.height)


def draw_map(
    axis: Axes,
    image: Image.Image,
    values: Tensor,
    grid: tuple[int, int],
    cell: float,
    most: float,
    place: Place | None = None,
) -> None:
    """An image, faded, and over it a map of a view of it: dark 0, bright `most` or more.

    values: [N], row-major over `grid` (rows, columns). cell: a patch's side as a share of the
    view's; the last patches may reach beyond the view, and are cut off there. place: the view's;
    the whole image by default.
    """
    place = place or whole(image)
    axis.imshow(image, alpha=0.45)
    values = values.view(grid)
    left, right = place.left, place.left + grid[1] * cell * place.width
    if place.flipped:
        values = values.flip(1)
        left, right = left + place.width - (right - left), place.left + place.width
    shown = axis.imshow(
        values.numpy(),
        extent=(left, right, place.top + grid[0] * cell * place.height, place.top),
        cmap="inferno",
        alpha=0.6,
        interpolation="nearest",
        vmin=0,
        vmax=most,
    )
    corner = (place.left, place.top)
    shown.set_clip_path(Rectangle(corner, place.width, place.height, transform=axis.transData))
    axis.set(xlim=(0, image.width), ylim=(image.height, 0))


def draw_box(axis: Axes, box: Sequence[float], color: str, line: float = 1, **look) -> None:
    """The frame of a box x0, y0, x1, y1 in pixels of the image; line: points."""
    x0, y0, x1, y1 = box
    look = {"edgecolor": color, "linewidth": line, "fill": False, **look}
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **look))


def sheet_size(rows: int, columns: int, cell: tuple[int, int] = (CELL, CELL)) -> tuple[int, int]:
    """Width and height, in pixels, of what `sheet` writes."""
    return EDGE + columns * (cell[0] + GAP), TITLES + rows * (cell[1] + GAP)


@contextlib.contextmanager
def sheet(
    path: Path,
    rows: int,
    columns: int,
    cell: tuple[int, int] = (CELL, CELL),
    titles: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Iterator[Callable[[int, int], Axes]]:
    """A grid of small pictures, written as PNG at the end of the block.

    Yields axis(row, column), which gives the empty axes of one place. cell: pixels of each.
    titles: over the columns; labels: beside the rows. InputError where it cannot be written.
    """
    width, height = sheet_size(rows, columns, cell)
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)

        def corner(row: int, column: int) -> np.ndarray:
            """The left lower corner of a place, in pixels from that of the sheet."""
            left = EDGE + column * (cell[0] + GAP)
            return np.array([left, height - TITLES - (row + 1) * (cell[1] + GAP) + GAP])

        def axis(row: int, column: int) -> Axes:
            x, y = corner(row, column)
            axes = figure.add_axes((x / width, y / height, cell[0] / width, cell[1] / height))
            axes.axis("off")
            return axes

        for column, title in enumerate(titles):
            x = corner(0, column)[0] + cell[0] / 2
            figure.text(
                x / width, 1 - TITLES / 2 / height, title, ha="center", va="center", size=12
            )
        for row, label in enumerate(labels):
            y = corner(row, 0)[1] + cell[1] / 2
            look = {"ha": "center", "va": "center", "size": 14, "weight": "bold"}
            figure.text(EDGE / 2 / width, y / height, label, **look)
        yield axis
        with replacing(path, "picture") as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
