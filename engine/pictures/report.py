"""What a run came to: figures beside their zeros."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from datasets.folder import ImageFolder
from datasets.multicrop import default_resize, eval_transform
from engine.evaluation import pointing
from engine.evaluation.attention import attention_map
from engine.evaluation.feature_cache import SplitFeatures
from engine.evaluation.features import Reading, extract, gallery_and_queries
from engine.evaluation.measure import KNN, measure
from engine.evaluation.source import Source
from models.network import Network
from utils.distributed import World

# The maps that training made, and what a report calls their zero: in JSON, in words.
UNTRAINED = {
    "mil": ("untrained_pooling", "untrained pooling on the trained network"),
    "lcr": ("untrained_branch", "untrained branch on the trained network"),
}


@dataclass(frozen=True)
class Setting:
    """Where and how a report measures.

    gallery, queries: folders, for the k-NN with class subfolders; None for none. size: pixels of
    the k-NN's centre crops, and at which the attention is shown whole images, so that parts'
    boxes hold. k: neighbours.
    """

    gallery: Path | None
    queries: Path | None
    size: int
    k: int
    world: World
    batch: int = 64
    workers: int = 0


def image_knn(network: Network, where: Setting) -> dict[str, float]:
    """k-NN of the image features, of resized centre crops as in eval_knn.py: percent."""
    splits = gallery_and_queries(where.gallery, where.queries)
    reading = Reading(
        where.world, where.size, default_resize(where.size), "fp32", where.batch, where.workers
    )
    (found,) = measure(SplitFeatures(Source(None, network), splits, reading), [KNN([where.k])])
    return found.figures["k"][str(where.k)]


def attention_maps(network: Network, kind: str, where: Setting) -> Tensor:
    """The map `kind` [n, N] of every query image, in their order; see attention.py."""
    images = ImageFolder(where.queries, eval_transform(where.size, where.size))
    look = partial(attention_map, network, kind=kind)
    return extract(look, images, where.world, where.batch, where.workers).values


def pointing_figures(
    network: Network,
    untrained: Network,
    kind: str,
    boxes: list[pointing.Box],
    box_size: int,
    where: Setting,
) -> dict[str, float]:
    """Pointing accuracy beside its three zeros, percent.

    untrained: the same network but for what makes the map, which is as a run begins.
    boxes: one a query image, in pixels of images of box_size x box_size.
    """
    grid = network.backbone.patch_grid(where.size, where.size)
    cell = network.backbone.stride * box_size / where.size
    touching = pointing.cells_touching(boxes, grid, cell)
    maps, zero = (attention_maps(one, kind, where) for one in (network, untrained))
    figures = pointing.figures(maps, touching)
    figures["attention_mass_on_part"] = figures.pop("mass_on_part")
    return figures | {UNTRAINED[kind][0]: pointing.pointing(zero, touching)}
