"""The pictures of visualize.py; each function writes one PNG and returns how to read it.

Networks come one a row, by their letters, on one scale: a map of N patches is drawn as multiples
of 1/N, since networks divide an image into different numbers of patches.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from torch import Tensor

from engine.evaluation import attention
from engine.pictures.overlays import CELL, GAP, Place, draw_box, draw_map, sheet
from engine.pictures.pictures import RIGHT, WRONG
from engine.pictures.visual import ShownImages, Subject
from engine.pictures.visual_views import Correspondence, View

PER_LINE = 4  # images, of pictures with one column an image
HEADS_PER_LINE = 6
PART, STRONGEST, FRAME = "cyan", "#ffffff", "#2b6cff"
# Brighter patches are all drawn as this quantile: one outlier would leave the others black.
BRIGHT = 0.98


def maps_picture(
    path: Path,
    images: ShownImages,
    found: Sequence[Subject],
    maps: dict[str, Tensor],
    kind: str,
    size: int,
) -> str:
    """Each image, and under it the map `kind` of each network; maps: letter -> [n, N]."""
    shown = [subject for subject in found if subject.letter in maps]
    most = brightest(maps.values())
    count = len(images.squares)
    columns, lines = min(PER_LINE, count), -(-count // PER_LINE)
    block = 1 + len(shown)
    labels = ["", *(subject.letter for subject in shown)] * lines
    with sheet(path, lines * block, columns, labels=labels) as axis:
        for index in range(count):
            line, column = divmod(index, columns)
            _draw_image(axis(line * block, column), images, index)
            for row, subject in enumerate(shown, start=1):
                place = axis(line * block + row, column)
                _draw_relative(
                    place, images, index, subject, maps[subject.letter][index], size, most
                )
                _mark_strongest(place, images, index, subject, maps[subject.letter][index], size)
    return (
        f"{attention.NAMES[kind]} of the whole image, below each image. {_scale(most)} The white "
        f"square is the strongest patch.{_part(images)}"
    )


def crops_picture(
    path: Path,
    images: ShownImages,
    found: Sequence[Subject],
    views: Sequence[Sequence[View]],
) -> str:
    """Each network's first map of views of an image, at their place in it.

    views: of each image the whole one, two global and any number of local ones.
    """
    names = ["image", "whole", "global 1", "global 2"]
    names += [f"local {number}" for number in range(1, len(views[0]) - 2)]
    drawn = {
        subject.letter: [_maps_of_views(subject, of_image) for of_image in views]
        for subject in found
    }
    most = brightest(map_ for of in drawn.values() for maps in of for map_ in maps)
    rows = len(views) * len(found)
    labels = [subject.letter for subject in found] * len(views)
    with sheet(path, rows, len(names), (150, 150), names, labels) as axis:
        for index, of_image in enumerate(views):
            square = images.squares[index]
            for number, subject in enumerate(found):
                row = index * len(found) + number
                _draw_image(axis(row, 0), images, index)
                for column, view in enumerate(of_image, start=1):
                    size = view.pixels.shape[-1]
                    grid = subject.network.backbone.patch_grid(size, size)
                    values = drawn[subject.letter][index][column - 1]
                    place, cell = axis(row, column), subject.cell(size)
                    relative = values * len(values)
                    draw_map(place, square, relative, grid, cell, most, view.place)
                    if column > 1:
                        draw_box(place, _box(view.place), FRAME, 1.5)
                    _draw_part(place, images, index)
    which = ", ".join(f"{one.letter}: {attention.NAMES[one.kinds[0]]}" for one in found)
    return (
        f"What each network looks at ({which}) in the whole image and in crops of it, drawn at "
        f"their place; the blue frame is the crop, all that the network was shown. {_scale(most)}"
        f"{_part(images)}"
    )


def heads_picture(
    path: Path, images: ShownImages, found: Sequence[Subject], heads: dict[str, Tensor], size: int
) -> str:
    """Each head's map of the last block, for each image; heads: letter -> [n, heads, N]."""
    shown = [subject for subject in found if subject.letter in heads]
    most = brightest(heads.values())
    columns = min(HEADS_PER_LINE, max(maps.shape[1] for maps in heads.values()))
    lines = {letter: -(-maps.shape[1] // columns) for letter, maps in heads.items()}
    images_shown = len(next(iter(heads.values())))
    labels = [subject.letter for subject in shown for _ in range(lines[subject.letter])]
    names = ["image", *(f"head {number}" for number in range(1, columns + 1))]
    names = names if max(lines.values()) == 1 else ["image"]
    rows = images_shown * len(labels)
    with sheet(path, rows, 1 + columns, (150, 150), names, labels * images_shown) as axis:
        row = 0
        for index in range(images_shown):
            for subject in shown:
                _draw_image(axis(row, 0), images, index)
                for head, values in enumerate(heads[subject.letter][index]):
                    line, column = divmod(head, columns)
                    place = axis(row + line, 1 + column)
                    _draw_relative(place, images, index, subject, values, size, most)
                row += lines[subject.letter]
    return (
        f"Self-attention from [CLS] to the patches, each head of a ViT's last block by itself, in "
        f"the heads' order. {_scale(most)} What a head gives to [CLS] itself is not drawn: a head "
        f"that is dark everywhere looks there.{_part(images)}"
    )


def correspondence_picture(
    path: Path,
    found: Sequence[Subject],
    pairs: Sequence[tuple[View, View]],
    matches: dict[str, Sequence[Correspondence]],
    queries: int,
) -> str:
    """Two views of each image side by side, and lines from patches to their matches."""
    per_line = min(2, len(pairs))
    lines = -(-len(pairs) // per_line)
    labels = [subject.letter for subject in found] * lines
    with sheet(path, len(labels), per_line, (2 * CELL + GAP, CELL), labels=labels) as axis:
        for index, pair in enumerate(pairs):
            line, column = divmod(index, per_line)
            for number, subject in enumerate(found):
                place = axis(line * len(found) + number, column)
                _draw_matches(place, pair, matches[subject.letter][index], queries)
    return (
        f"Two views of an image as training makes them, each with its own crop, flip and colours. "
        f"A line leads from a patch of the left view (dot) to the patch of the right view whose "
        f"feature is most alike, the one that L_R would take. Green, solid: it is the right place "
        f"or a patch beside it. Red, dashed: it is not, and the ring shows the right place. "
        f"{queries} patches of those whose place both views show are drawn."
    )


def brightest(maps) -> float:
    """The top of a common scale, in multiples of an even share, which is at most half way up."""
    relative = torch.cat([(values * values.shape[-1]).flatten() for values in maps])
    return max(2.0, relative.double().quantile(BRIGHT).item())


def _scale(most: float) -> str:
    return (
        f"Dark: nothing; bright: {most:.1f} times an even share or more, on one scale for all rows."
    )


def _part(images: ShownImages) -> str:
    return " Cyan box: the part." if images.boxes else ""


def _maps_of_views(subject: Subject, views: Sequence[View]) -> list[Tensor]:
    """The network's first map, [N], of each view; views of different sizes fit no one batch."""
    return [
        attention.attention_map(
            subject.network, view.pixels[None].to(subject.device), subject.kinds[0]
        )[0].cpu()
        for view in views
    ]


def _draw_image(axis: Axes, images: ShownImages, index: int) -> None:
    square = images.squares[index]
    axis.imshow(square)
    axis.set(xlim=(0, square.width), ylim=(square.height, 0))
    _draw_part(axis, images, index)


def _draw_relative(
    axis: Axes,
    images: ShownImages,
    index: int,
    subject: Subject,
    values: Tensor,
    size: int,
    most: float,
) -> None:
    """A map [N] of the whole image, as multiples of the uniform share."""
    grid = subject.network.backbone.patch_grid(size, size)
    relative = values * len(values)
    draw_map(axis, images.squares[index], relative, grid, subject.cell(size), most)
    _draw_part(axis, images, index)


def _mark_strongest(
    axis: Axes, images: ShownImages, index: int, subject: Subject, values: Tensor, size: int
) -> None:
    _, columns = subject.network.backbone.patch_grid(size, size)
    row, column = divmod(int(values.argmax()), columns)
    side = subject.cell(size) * images.squares[index].width
    box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
    draw_box(axis, box, STRONGEST, 1.5)


def _draw_part(axis: Axes, images: ShownImages, index: int) -> None:
    if (box := images.box(index)) is not None:
        draw_box(axis, box, PART)


def _box(place: Place) -> tuple[float, float, float, float]:
    return place.left, place.top, place.left + place.width, place.top + place.height


def _draw_matches(axis: Axes, pair: tuple[View, View], found: Correspondence, queries: int) -> None:
    """Both views in one picture: the left one from 0 to 1, the right one beyond a gap."""
    start = 1 + GAP / CELL
    for view, left in zip(pair, (0, start), strict=True):
        axis.imshow(view.picture().numpy(), extent=(left, left + 1, 1, 0))
    visible = found.visible.nonzero().flatten()
    places = torch.linspace(0, max(len(visible) - 1, 0), min(queries, len(visible)))
    halo = [withStroke(linewidth=3, foreground="white")]
    for patch in visible[places.round().long()].tolist():
        right = bool(found.right[patch])
        color, style = (RIGHT, "-") if right else (WRONG, "--")
        (x0, y0), (x1, y1) = found.centre[patch].tolist(), found.matched[patch].tolist()
        axis.plot([x0, start + x1], [y0, y1], style, color=color, linewidth=1.4, path_effects=halo)
        axis.plot(x0, y0, "o", color=color, markersize=5, markeredgecolor="white")
        if not right:
            x, y = found.true[patch].tolist()
            ring = Circle((start + x, y), 0.025, fill=False, edgecolor=color, linewidth=1.5)
            ring.set_path_effects(halo)
            axis.add_patch(ring)
    axis.set(xlim=(0, start + 1), ylim=(1, 0), aspect="auto")
