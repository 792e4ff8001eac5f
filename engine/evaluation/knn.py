"""Weighted k-nearest-neighbour classification (Wu et al. 2018), the field's quick probe."""

import torch
from torch import Tensor

from engine.evaluation.similarity import (
    BLOCK_ELEMENTS,
    Blocks,
    Gallery,
    free_bytes,
    nearest,
    over_blocks,
)
from utils.distributed import ALONE, World

TOP = 5
# Bytes for each similarity: float32, and what ties at the last place take.
EACH = 24


def accuracy(ranking: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, percent, of ranked classes [m, <= 5] against labels [m]."""
    correct = ranking == labels[:, None]
    hits = correct[:, 0].sum().item(), correct.any(1).sum().item()
    return tuple(100 * count / len(labels) for count in hits)


@torch.no_grad()
def rankings(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    ks: list[int],
    temperature: float,
    classes: int,
    world: World = ALONE,
    room: int | None = None,
) -> dict[int, Tensor]:
    """The best classes of each query, best first: [m, min(5, classes)] int64 for each k.

    -1 stands where no further class has a vote: it is no answer, though EsViT counts it (DINO
    does so no more where k < 5).

    gallery [n, D], queries [m, D]: features on the CPU of any scale and float type,
    L2-normalised here; gallery_labels [n] int64, below `classes`. world: the processes that
    share the work, and the device. The result is on the CPU, on every process, with the same
    bits for any number of processes. room: bytes of the device, by default all that are free on a
    GPU; a gallery for which they are too few is brought over by parts.
    A neighbour votes for its class with exp(cosine / temperature) in float32. Ties: neighbours
    by gallery order, classes by index. A k above n counts the whole gallery.
    """
    most, voting = min(max(ks), len(gallery)), max(1, BLOCK_ELEMENTS // classes)
    blocks = Blocks.that_fit(*gallery.shape, EACH, room or free_bytes(world))
    features = Gallery(gallery, blocks, world.device)

    def ranked(block: Tensor, _: slice) -> list[Tensor]:
        # Votes are summed on the CPU, in the neighbours' order: a GPU sums in any.
        values, places = (part.cpu() for part in features.nearest(block, most))
        # Relative to the nearest one's vote, which changes no order and cannot overflow.
        votes = ((values - values[:, :1]) / temperature).exp()
        pairs = [*zip(votes.split(voting), gallery_labels[places].split(voting), strict=True)]
        return [
            torch.cat([best_classes(vote[:, :k], label[:, :k], classes) for vote, label in pairs])
            for k in ks
        ]

    found = over_blocks(ranked, queries, blocks.queries, world)
    return dict(zip(ks, found, strict=True))


def best_classes(votes: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Classes [m, min(5, classes)] by the sum of their votes [m, k], equals by index; -1 for 0."""
    scores = votes.new_zeros(len(votes), classes).scatter_add_(1, labels, votes)
    scores, best = nearest(scores, min(TOP, classes))
    return best.where(scores > 0, -1)
