"""Which patches of two views of an image match, and whether geometry agrees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from torch import Tensor

from engine.pictures.drawing import LOOK, RIGHT, WRONG, Picture, evenly, sheet
from engine.pictures.views import BATCH, Place, PlacedView, in_batches
from losses.intra import match_patches
from models.network import Network
from utils.views import Views

Pair = tuple[PlacedView, PlacedView]  # of one image and one size: student view, teacher view
# A match counts where it is at most this many patches from the right one, along each side.
BESIDE = 1
_SIDE, _GAP = 2.0, 0.04  # of a view: inches; the gap between two, as a share of a view's side


@dataclass(frozen=True)
class Correspondence:
    """For each of the N patches of a student view, in row-major order, its match in a teacher view.

    centre, matched, true: [N, 2], x and y as shares of the view's sides: the patch's centre in
    the student view, the centre of the patch m*(n) of the teacher view that it matches, and
    where its centre truly lies there. visible: bool [N], whether the teacher view shows that
    place. right: bool [N], visible and m*(n) at most BESIDE patches from the right one.
    same_cell: as right, had each patch matched the one in its own row and column. chance:
    float [N], the share of the teacher view's patches that would count.
    """

    centre: Tensor
    matched: Tensor
    true: Tensor
    visible: Tensor
    right: Tensor
    same_cell: Tensor
    chance: Tensor


def correspondences(network: Network, pairs: Sequence[Pair]) -> list[Correspondence]:
    """Of pairs of views of one size; m*(n) as in L_R (losses/intra.py).

    Both views' features are of this one network, in eval mode.
    """
    backbone, size = network.backbone, pairs[0][0].pixels.shape[-1]
    grid, cell = backbone.patch_grid(size, size), backbone.stride / size
    found = []
    for first in range(0, len(pairs), BATCH):
        student, teacher = zip(*pairs[first : first + BATCH], strict=True)
        patches = in_batches(lambda images: backbone(images)[1], network, [*student, *teacher])
        student_patches, teacher_patches = patches.chunk(2)
        # Of the image embeddings the matching reads how many there are.
        views = Views(
            batch=len(teacher),
            image_embeddings=teacher_patches.mean(dim=1),
            patch_features=[teacher_patches],
        )
        matches = match_patches(student_patches, views)[..., 0]
        for match, of_student, of_teacher in zip(matches, student, teacher, strict=True):
            found.append(judge(match, of_student.place, of_teacher.place, grid, cell))
    return found


def judge(
    match: Tensor, student: Place, teacher: Place, grid: tuple[int, int], cell: float
) -> Correspondence:
    """match: int64 [N], m*(n); cell: a patch's side as a share of a view's side."""
    centre = centres(grid, cell)
    true = teacher.to_view(student.to_image(centre))
    visible = ((true >= 0) & (true < 1)).all(dim=1)
    right_patch = (true / cell).floor()

    def counts(patches: Tensor) -> Tensor:
        """Whether patches (their numbers [..., N]) are the right ones or beside them."""
        at = torch.stack([patches % grid[1], patches // grid[1]], dim=-1)
        return visible & ((at - right_patch).abs().amax(dim=-1) <= BESIDE)

    everywhere = torch.arange(len(centre))
    return Correspondence(
        centre,
        centre[match],
        true,
        visible,
        counts(match),
        counts(everywhere),
        counts(everywhere[:, None].expand(-1, len(centre))).double().mean(dim=0),
    )


def centres(grid: tuple[int, int], cell: float) -> Tensor:
    """Centres of the patches' parts inside the view: float64 [N, 2], x and y as shares."""
    y, x = (
        (edges[:-1] + edges[1:]) / 2
        for edges in ((torch.arange(n + 1, dtype=torch.float64) * cell).clamp(max=1) for n in grid)
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def correspondence_figures(found: Sequence[Correspondence]) -> dict[str, float]:
    """Over the patches whose place both views show, percent; see Correspondence."""
    visible = torch.cat([one.visible for one in found])
    if not visible.any():
        return {"patches": 0}

    def percent(values: list[Tensor]) -> float:
        return 100 * torch.cat(values)[visible].double().mean().item()

    return {
        "patches": int(visible.sum()),
        "on_or_beside": percent([one.right for one in found]),
        "chance": percent([one.chance for one in found]),
        "same_row_and_column": percent([one.same_cell for one in found]),
    }


@LOOK
def correspondence_picture(
    pairs: Sequence[Pair],
    matches: Mapping[str, Sequence[Correspondence]],
    queries: int,
) -> Picture:
    """Two views of each image side by side, and lines from patches to their matches.

    matches: letter -> one for each pair, or more. queries: patches of each pair that are drawn.
    """
    per_line = min(2, len(pairs))
    lines = -(-len(pairs) // per_line)
    cell = ((2 + _GAP) * _SIDE, _SIDE)
    figure, axes = sheet(lines * len(matches), per_line, cell, labels=[*matches] * lines)
    for index, pair in enumerate(pairs):
        line, column = divmod(index, per_line)
        for number, of_network in enumerate(matches.values()):
            axis = axes[line * len(matches) + number, column]
            _draw_matches(axis, pair, of_network[index], queries)
    caption = (
        f"Two views of an image as training makes them, each with its own crop, flip and colours. "
        f"A line leads from a patch of the left view (dot) to the patch of the right view whose "
        f"feature is most alike, the one that L_R would take. Green, solid: it is the right place "
        f"or a patch beside it. Red, dashed: it is not, and the ring shows the right place. "
        f"{queries} patches of those whose place both views show are drawn."
    )
    return Picture("Which patches of two views match", figure, caption, 2 * per_line)


def _draw_matches(axis: Axes, pair: Pair, found: Correspondence, queries: int) -> None:
    """Both views in one picture: the left one from 0 to 1, the right one beyond a gap."""
    start = 1 + _GAP
    for view, left in zip(pair, (0, start), strict=True):
        axis.imshow(view.picture().numpy(), extent=(left, left + 1, 1, 0))
    visible = found.visible.nonzero().flatten()
    halo = [withStroke(linewidth=3, foreground="white")]
    for patch in visible[evenly(len(visible), queries)].tolist():
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
    axis.set(xlim=(0, start + 1), ylim=(1, 0))
