"""Does a map look at the same place in two views of an image? A figure without boxes (ours)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.pictures.maps import PatchMap
from engine.pictures.matches import centres

FEWEST = 4  # patches in common, below which two views say nothing
_EVEN = 1e-5  # deviation of a map in multiples of an even share, below which it is even


def figures(first: Sequence[PatchMap], second: Sequence[PatchMap]) -> dict[str, float | int]:
    """How steady and how narrow a map is, over the maps of two views of each of some images.

    steadiness: the correlation of the first view's map with the second's at the same places of the
    image, over the patches of the first whose centre both show; the mean over images. other_image:
    the same with the second view's map of the next image: what a map owes to the place in the view
    alone; left out of a single image. images: how many counted, with FEWEST patches in common and
    no even map; of none there are no correlations. effective_patches: exp of the entropy, percent
    of the number of patches, the mean over all maps; 100: even.
    """
    own, other = [], []
    for one, two, of_next in zip(first, second, (*second[1:], second[0]), strict=True):
        places = two.place.to_view(one.place.to_image(centres(one.grid, one.cell)))
        visible = ((places >= 0) & (places < 1)).all(dim=1)
        column, row = (places[visible] / two.cell).long().unbind(1)
        there = row * two.grid[1] + column
        here = one.relative()[visible]
        pair = [correlation(here, of.relative()[there]) for of in (two, of_next)]
        if len(here) >= FEWEST and None not in pair:
            own.append(pair[0])
            other.append(pair[1])
    values = torch.stack([of.values.double() for of in (*first, *second)])
    entropy = -torch.xlogy(values, values).sum(dim=1)
    told = {"images": len(own)}
    if own:
        told["steadiness"] = sum(own) / len(own)
    if own and len(first) > 1:
        told["other_image"] = sum(other) / len(other)
    return told | {"effective_patches": 100 * entropy.exp().mean().item() / values.shape[1]}


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's, of two maps [n] in multiples of an even share; None where one of them is even."""
    a, b = a.double(), b.double()
    if len(a) < 2 or min(a.std(correction=0), b.std(correction=0)) < _EVEN:
        return None
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm())).item()
