"""Seeded views of images whose place is known, and which patches of two views match."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from datasets.batched import BatchedMultiCrop, Images
from datasets.multicrop import IMAGENET_MEAN, IMAGENET_STD, Augmentation, sample_seed
from engine.pictures.overlays import Place
from engine.pictures.visual import BATCH
from losses.intra import match_patches
from models.network import Network
from utils.views import Views

# A match counts where it is at most this many patches from the right one, along each side.
BESIDE = 1
_NO_COLOURS = {
    "color_jitter_prob": 0.0,
    "grey_prob": 0.0,
    "flip_prob": 0.0,
    "solarise_prob": 0.0,
    "blur_prob": (0.0, 0.0, 0.0),
}


@dataclass(frozen=True)
class View:
    """A crop of an image: normalised pixels [3, S, S], and where it was cut."""

    pixels: Tensor
    place: Place

    def picture(self) -> Tensor:
        """[S, S, 3], 0..1, as it is shown."""
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        return (self.pixels.permute(1, 2, 0) * std + mean).clamp(0, 1)


def seeded_views(
    squares: Sequence[Image.Image],
    size: int,
    local_size: int,
    local_crops: int,
    seed: int,
    plain: bool,
) -> list[list[View]]:
    """Of each image two global views of `size` and `local_crops` local ones of `local_size` pixels.

    Boxes, and unless `plain` flips and colours too, are drawn as in training (the scales and
    probabilities of the field), for each image from (seed, its place here).
    """
    augment = BatchedMultiCrop(
        Augmentation(
            size,
            local_crops_number=(local_crops,),
            local_crops_size=(local_size,),
            **(_NO_COLOURS if plain else {}),
        )
    )
    found = []
    for index, square in enumerate(squares):
        sides = [(square.height, square.width)]
        draws = augment.draw(sample_seed(seed, 0, index))[None]
        cuts = augment.parameters(sides, draws)
        crops = augment(Images(pil_to_tensor(square)[None], sides), draws)
        columns = [getattr(cuts, name)[0] for name in ("left", "top", "width", "height", "flipped")]
        places = [Place(*values) for values in zip(*(c.tolist() for c in columns), strict=True)]
        views = zip((crop[0] for crop in crops), places, strict=True)
        found.append([View(pixels, place) for pixels, place in views])
    return found


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


@torch.no_grad()
def correspondences(network: Network, pairs: Sequence[tuple[View, View]]) -> list[Correspondence]:
    """Of pairs (student view, teacher view) of one size; m*(n) as in L_R (losses/intra.py).

    Both views' features are of this one network, in eval mode.
    """
    batches = [pairs[first : first + BATCH] for first in range(0, len(pairs), BATCH)]
    return [one for batch in batches for one in _correspondences(network, batch)]


def _correspondences(network: Network, pairs: Sequence[tuple[View, View]]) -> list[Correspondence]:
    backbone = network.backbone
    device = next(backbone.parameters()).device
    student, teacher = (
        torch.stack([view.pixels for view in views]).to(device)
        for views in zip(*pairs, strict=True)
    )
    image_features, patch_features = backbone(teacher)
    views = Views(
        batch=len(teacher),
        image_embeddings=image_features,
        image_prototypes=image_features,
        patch_features=[patch_features],
    )
    matches = match_patches(backbone(student)[1], views)[..., 0].cpu()
    size = student.shape[-1]
    grid, cell = backbone.patch_grid(size, size), backbone.stride / size
    return [
        judge(match, of_student.place, of_teacher.place, grid, cell)
        for match, (of_student, of_teacher) in zip(matches, pairs, strict=True)
    ]


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
