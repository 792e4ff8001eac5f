"""Views of images whose place in the image is known: whole images, and seeded crops of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from datasets.batched import BatchedMultiCrop, Images
from datasets.multicrop import Augmentation, eval_transform, sample_seed
from models.network import Network
from utils.errors import InputError
from utils.normalisation import IMAGENET

BATCH = 32  # images in one forward
_NO_COLOURS = {
    "color_jitter_prob": 0.0,
    "grey_prob": 0.0,
    "flip_prob": 0.0,
    "solarise_prob": 0.0,
    "blur_prob": (0.0, 0.0, 0.0),
}


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


@dataclass(frozen=True)
class PlacedView:
    """A crop of an image: pixels [3, S, S], normalised by ImageNet's, and where it was cut."""

    pixels: Tensor
    place: Place

    def picture(self) -> Tensor:
        """[S, S, 3], 0..1, as it is shown."""
        mean, std = map(torch.tensor, IMAGENET)
        return (self.pixels.permute(1, 2, 0) * std + mean).clamp(0, 1)


def whole_views(squares: Sequence[Image.Image], size: int) -> list[PlacedView]:
    """Each image as an evaluation shows it to a network, at `size` pixels."""
    transform = eval_transform(size, size)
    return [PlacedView(transform(square), Place(0, 0, *square.size)) for square in squares]


def seeded_views(
    squares: Iterable[Image.Image],
    size: int,
    local_size: int,
    local_crops: int,
    seed: int,
    plain: bool,
) -> list[list[PlacedView]]:
    """Of each image two global views of `size` and `local_crops` local ones of `local_size` pixels.

    Boxes, and unless `plain` flips and colours too, are drawn as in training (the scales and
    probabilities of the field), for each image from (seed, its place here).
    """
    settings = Augmentation(
        size,
        local_crops_number=(local_crops,),
        local_crops_size=(local_size,),
        **(_NO_COLOURS if plain else {}),
    )
    augment = BatchedMultiCrop(settings)
    views = []
    for index, square in enumerate(squares):
        sides = [(square.height, square.width)]
        draws = augment.draw(sample_seed(seed, 0, index))[None]
        cuts = augment.parameters(sides, draws)[0]
        crops = augment(Images(pil_to_tensor(square)[None], sides), draws)
        places = cuts[["left", "top", "width", "height", "flipped"]].tolist()
        views.append(
            [PlacedView(crop[0], Place(*place)) for crop, place in zip(crops, places, strict=True)]
        )
    return views


@torch.no_grad()
def in_batches(
    function: Callable[[Tensor], Tensor], network: Network, views: Sequence[PlacedView]
) -> Tensor:
    """function(pixels [b, 3, S, S]) of views of one size, on the network's device, BATCH at a time.

    Returns the rows of all views on the CPU. Raises InputError where they are not finite.
    """
    device = next(network.parameters()).device
    pixels = torch.stack([view.pixels for view in views])
    pixels = network.backbone.normalisation.of_imagenets(pixels)
    rows = torch.cat([function(part.to(device)).cpu() for part in pixels.split(BATCH)])
    if not rows.isfinite().all():
        raise InputError(
            "what a network gives for these images holds NaN or infinity, so there is nothing to "
            "show: the run that made it has diverged, take an earlier checkpoint."
        )
    return rows
