"""Maps of what a network looks at, drawn over the images; each kind of picture is a function here.

All maps of a picture have one scale, in multiples of an even share: a map of N patches is drawn as
multiples of 1/N, since networks divide an image into different numbers of patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from engine.evaluation import attention, pointing
from engine.pictures.drawing import LOOK, Picture, sheet, short
from engine.pictures.shown import ShownImages
from engine.pictures.views import Place, PlacedView, in_batches
from models.network import Network

PER_LINE = 4  # images, of pictures with one column an image
HEADS_PER_LINE = 6
PART, STRONGEST, FRAME = "cyan", "white", "#2b6cff"
# Brighter patches are all drawn as this quantile: one outlier would leave the others black.
BRIGHT = 0.98


@dataclass(frozen=True)
class PatchMap:
    """A map over the patches of a view of an image.

    values: [N] float32 on the CPU, row-major over `grid` (rows, columns). cell: a patch's side as
    a share of the view's; the last patches may reach beyond the view. place: the view's.
    """

    values: Tensor
    grid: tuple[int, int]
    cell: float
    place: Place

    def relative(self) -> Tensor:
        """[N], multiples of an even share."""
        return self.values * len(self.values)


def _patch_maps(network: Network, views: Sequence[PlacedView], values: Tensor) -> list[PatchMap]:
    """values: [n, N], of n views of one size."""
    size = views[0].pixels.shape[-1]
    grid, cell = network.backbone.patch_grid(size, size), network.backbone.stride / size
    return [PatchMap(of, grid, cell, view.place) for of, view in zip(values, views, strict=True)]


def maps_of_views(network: Network, views: Sequence[PlacedView], kind: str) -> list[PatchMap]:
    """The map `kind` (see attention.py) of each of some views of one size."""
    look = partial(attention.attention_map, network, kind=kind)
    return _patch_maps(network, views, in_batches(look, network, views))


def heads_of_views(network: Network, views: Sequence[PlacedView]) -> list[list[PatchMap]]:
    """The map of each head of a ViT's last block, of each view: maps[view][head]."""
    values = in_batches(network.backbone.class_attention, network, views)
    of_heads = [_patch_maps(network, views, head) for head in values.unbind(dim=1)]
    return [list(of_view) for of_view in zip(*of_heads, strict=True)]


def pointing_of(maps: Sequence[PatchMap], images: ShownImages) -> dict[str, float]:
    """How the maps of whole images point at the parts, percent; see pointing.figures."""
    cell = maps[0].cell * images.squares[0].width
    touching = pointing.cells_touching(images.boxes, maps[0].grid, cell)
    return pointing.figures(torch.stack([of.values for of in maps]), touching)


def whole_picture(
    images: ShownImages, maps: Mapping[str, Sequence[PatchMap]], kind: str, per_line: int = PER_LINE
) -> Picture:
    """Each image, and under it the map `kind` of each network; maps: letter -> one an image."""
    rows = []
    for first in range(0, len(images.names), per_line):
        line = range(first, min(first + per_line, len(images.names)))
        rows.append(("", [(index, None) for index in line]))
        rows += [
            (letter, [(i, of_network[i]) for i in line]) for letter, of_network in maps.items()
        ]
    figure, scale = _maps_over_images(images, rows, names=True)
    caption = f"{attention.NAMES[kind]} of the whole image, below each image. {scale}"
    return Picture(attention.NAMES[kind], figure, caption, min(per_line, len(images.names)))


def crops_picture(
    images: ShownImages, networks: Mapping[str, Network], views: Sequence[Sequence[PlacedView]]
) -> Picture:
    """Each network's first map of views of an image, at their place in it.

    views: of each image the whole one, two global and any number of local ones.
    """
    kinds = {letter: attention.kinds(network)[0] for letter, network in networks.items()}
    by_column = list(zip(*views, strict=True))
    maps = {
        letter: [maps_of_views(network, column, kinds[letter]) for column in by_column]
        for letter, network in networks.items()
    }
    rows = [
        (letter, [(index, None), *((index, column[index]) for column in columns)])
        for index in range(len(views))
        for letter, columns in maps.items()
    ]
    titles = ["image", "whole", "global 1", "global 2"]
    titles += [f"local {number}" for number in range(1, len(by_column) - 2)]
    figure, scale = _maps_over_images(images, rows, titles)
    which = ", ".join(f"{letter}: {attention.NAMES[kind]}" for letter, kind in kinds.items())
    caption = (
        f"What each network looks at ({which}) in the whole image and in crops of it, drawn at "
        f"their place; the blue frame is the crop, all that the network was shown. {scale}"
    )
    return Picture("The first map, crop by crop", figure, caption, len(titles))


def heads_picture(
    images: ShownImages, heads: Mapping[str, Sequence[Sequence[PatchMap]]]
) -> Picture:
    """Each head's map of the last block, of each image; heads: letter -> maps[image][head]."""
    most = max(len(of_network[0]) for of_network in heads.values())
    columns = min(HEADS_PER_LINE, most)
    rows = []
    for index in range(len(images.names)):
        for letter, of_network in heads.items():
            cells = [(index, head) for head in of_network[index]]
            for first in range(0, len(cells), columns):
                start = (index, None) if first == 0 else None
                rows.append((letter, [start, *cells[first : first + columns]]))
    titles = ["image", *(f"head {number}" for number in range(1, columns + 1))]
    figure, scale = _maps_over_images(images, rows, titles if most == columns else ())
    caption = (
        f"Self-attention from [CLS] to the patches, each head of a ViT's last block by itself, in "
        f"the heads' order. {scale} What a head gives to [CLS] itself is not drawn: a head "
        f"that is dark everywhere looks there."
    )
    return Picture("Self-attention, head by head", figure, caption, 1 + columns)


def brightest(maps: Sequence[PatchMap]) -> float:
    """The top of a common scale, in multiples of an even share, which is at most half way up."""
    relative = torch.cat([of.relative() for of in maps])
    return max(2.0, relative.double().quantile(BRIGHT).item())


@LOOK
def _maps_over_images(
    images: ShownImages,
    rows: Sequence[tuple[str, Sequence[tuple[int, PatchMap | None] | None]]],
    titles: Sequence[str] = (),
    names: bool = False,
) -> tuple[Figure, str]:
    """A sheet whose cells are images or maps over them, and how to read its colours.

    rows: each a label and cells (which image, its map or None for the image alone), or None for
    an empty cell. titles: over the columns. names: whether images have their class's above them.
    """
    most = brightest([cell[1] for _, row in rows for cell in row if cell and cell[1]])
    columns = max(len(row) for _, row in rows)
    side = 2.0 if columns <= PER_LINE else 1.5
    labels = [label for label, _ in rows]
    figure, axes = sheet(len(rows), columns, (side, side), titles, labels)
    for line, (_, row) in zip(axes, rows, strict=True):
        for axis, cell in zip(line, row, strict=False):
            if cell is None:
                continue
            index, patch_map = cell
            square = images.squares[index]
            axis.imshow(square, alpha=1 if patch_map is None else 0.45)
            if patch_map is not None:
                draw_map(axis, patch_map, most, square.size)
            elif names:
                name = PurePath(images.names[index])
                axis.set_title(short(name.parent.name or name.name, int(14 * side)), fontsize=8)
            if images.boxes:
                _draw_box(axis, images.boxes[index], PART, 1)
            axis.set(xlim=(0, square.width), ylim=(square.height, 0))
    scale = (
        f"Dark: nothing; bright: {most:.1f} times an even share or more, on one scale for all "
        f"rows. The white square is the strongest patch."
    )
    return figure, scale + (" Cyan box: the part." if images.boxes else "")


def draw_map(axis: Axes, patch_map: PatchMap, most: float, whole: tuple[int, int]) -> None:
    """A map at the place of its view: dark 0, bright `most` multiples of an even share or more.

    The strongest patch has a white frame, and a view that is not the whole image (of `whole`
    pixels) a blue one. A view must not be flipped.
    """
    place, (rows, columns) = patch_map.place, patch_map.grid
    width, height = patch_map.cell * place.width, patch_map.cell * place.height
    right, bottom = place.left + place.width, place.top + place.height
    shown = axis.imshow(
        patch_map.relative().view(rows, columns).numpy(),
        extent=(place.left, place.left + columns * width, place.top + rows * height, place.top),
        cmap="inferno",
        alpha=0.6,
        interpolation="nearest",
        vmin=0,
        vmax=most,
    )
    inside = Rectangle((place.left, place.top), place.width, place.height)
    inside.set_transform(axis.transData)
    shown.set_clip_path(inside)
    row, column = divmod(int(patch_map.values.argmax()), columns)
    x, y = place.left + column * width, place.top + row * height
    _draw_box(axis, (x, y, min(x + width, right), min(y + height, bottom)), STRONGEST, 1.5)
    if (place.left, place.top, place.width, place.height) != (0, 0, *whole):
        _draw_box(axis, (place.left, place.top, right, bottom), FRAME, 1.5)


def _draw_box(axis: Axes, box: Sequence[float], color: str, line: float) -> None:
    """The frame of a box x0, y0, x1, y1 in pixels of the image; line: points."""
    x0, y0, x1, y1 = box
    frame = Rectangle((x0, y0), x1 - x0, y1 - y0, edgecolor=color, linewidth=line, fill=False)
    axis.add_patch(frame)
