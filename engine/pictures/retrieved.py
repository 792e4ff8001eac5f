"""Retrieval as a picture: queries and the images that were found for them."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageOps
from torch import Tensor

from datasets.folder import LabelledImages, UnreadableImage
from engine.pictures.drawing import DPI, LOOK, RIGHT, WRONG, evenly, readable, sheet, wrapped

# Photographs in PNG take some 2.5 bytes a pixel: all thumbnails together stay near 1.6 MB.
_PIXELS_OF_THUMBNAILS = 650_000
_SMALLEST_SIDE, _LARGEST_SIDE = 64, 160
_FRAME = 2  # points


def choose_queries(average_precision: Tensor, count: int = 8) -> list[int]:
    """Queries to show: evenly spaced by rank from the best average precision to the worst.

    average_precision: [m] float. Returns min(count, m) indices, the best first; of equals the
    earlier counts as better.
    """
    ranking = average_precision.argsort(descending=True, stable=True)
    return ranking[evenly(len(ranking), count)].tolist()


@LOOK
def plot_retrieved(
    queries: LabelledImages,
    gallery: LabelledImages,
    places: Tensor,
    chosen: Sequence[int],
    title: str,
) -> Figure:
    """One row a chosen query: the query, then its first hits, right and wrong ones marked.

    queries, gallery: labels of both number the gallery's classes. The files are shown as they are,
    cropped to the centre square.
    places: int64 [q, h], the gallery's places of the h first hits of each of the q `chosen`
    queries, of which there is one at least. Files that cannot be read are shown as empty boxes.
    """
    hits = places.shape[1]
    side = int((_PIXELS_OF_THUMBNAILS / (len(chosen) * (hits + 1))) ** 0.5)
    side = min(max(side, _SMALLEST_SIDE), _LARGEST_SIDE)
    titles = ["query", *(f"hit {hit}" for hit in range(1, hits + 1))]
    figure, axes = sheet(len(chosen), 1 + hits, (side / DPI, side / DPI + 0.3), titles)
    for row, query, found in zip(axes, chosen, places.tolist(), strict=True):
        label = queries.labels[query]
        _draw_image(row[0], queries, query, gallery.classes, side)
        row[0].spines[:].set(visible=True, linewidth=_FRAME)
        for axis, place in zip(row[1:], found, strict=True):
            _draw_image(axis, gallery, place, gallery.classes, side)
            color, style = _frame(label, gallery.labels[place])
            axis.spines[:].set(visible=True, linewidth=_FRAME, color=color, linestyle=style)
    figure.suptitle(wrapped(title, int(10 * figure.get_figwidth()), 3), fontsize=10, weight="bold")
    legend = {"same class as the query": _frame(0, 0), "another class": _frame(0, 1)}
    frames = [
        Patch(facecolor="none", edgecolor=color, linestyle=style, linewidth=_FRAME, label=text)
        for text, (color, style) in legend.items()
    ]
    figure.legend(handles=frames, loc="outside lower center", fontsize=8, ncols=2, frameon=False)
    return figure


def _frame(query_label: int, label: int) -> tuple[str, str]:
    """The colour and the line of a hit's frame."""
    return (RIGHT, "solid") if query_label == label else (WRONG, "dashed")


def _draw_image(
    axis: Axes, images: LabelledImages, index: int, classes: list[str], side: int
) -> None:
    """The centre square of an image at side x side pixels, and its class's name below."""
    try:
        square = ImageOps.fit(images.load(index), (side, side), Image.Resampling.LANCZOS)
    except UnreadableImage:
        square = Image.new("RGB", (side, side), "white")
        axis.text(side / 2, side / 2, "unreadable", ha="center", va="center", fontsize=8)
    axis.imshow(square)
    name = readable(classes[images.labels[index]])
    axis.set_xlabel(wrapped(name, side // 6 + 1, 2), fontsize=7)
