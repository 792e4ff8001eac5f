"""Image retrieval by cosine: Rank-1, Rank-5 and mean average precision."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.evaluation.similarity import Blocks, Gallery, free_bytes, over_blocks
from utils.distributed import ALONE, World

RELEASED_DEPTH = 100
# Similarities ranked at a time on a CPU: their keys are made in memory that is used again. This
# takes half the time of a whole block.
SORTED_ELEMENTS = 2**22
EACH = 64  # bytes for each similarity on a GPU: itself, its key, and what sorting takes
NEVER = 2**62  # the rank of a positive that is not there


@dataclass(frozen=True, eq=False)
class Ranked:
    """Figures in percent over all queries, and what they are made of.

    map: mean over queries of the average precision over the whole gallery: the mean over a
    query's positives of the precision at each. map_at_100_released: as the released CMD code
    has it, average precision over the positives among the first 100, divided by their number
    (0 where none): positives that come later cost nothing, so it flatters.
    average_precision: [m] float64, 0 to 1, of the whole gallery; 0 for a query without
    positives. first: [m, h] int64, gallery places of the first hits.
    """

    rank1: float
    rank5: float
    map: float
    map_at_100_released: float
    queries_without_positives: int
    average_precision: Tensor
    first: Tensor


@torch.no_grad()
def retrieve(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    first: int = 10,
    world: World = ALONE,
    room: int | None = None,
) -> Ranked:
    """Rank the whole gallery for each query; a gallery image of the same label is positive.

    gallery [n, D], queries [m, D]: features on the CPU of any scale and float type,
    L2-normalised here; labels int64. first: gallery places to keep, min(first, n) of them.
    world: the processes that share the work, and the device. Every process returns the same
    bits, whatever their number. room: as in `knn.rankings`. Ties: gallery order.
    """
    blocks = Blocks.that_fit(*gallery.shape, EACH, room or free_bytes(world))
    features = Gallery(gallery, blocks, world.device)
    labels, by_label = gallery_labels.to(world.device).sort(stable=True)
    targets = query_labels.to(world.device)

    def ranked(block: Tensor, rows: slice) -> list[Tensor]:
        def ranks(similarities: Callable[[], Iterable], targets: Tensor) -> list[Tensor]:
            return ranks_of(similarities, labels, by_label, targets, first)

        if not features.is_whole:
            return ranks(lambda: features.similarities(block), targets[rows])
        ((_, similarity),) = features.similarities(block)
        on_cpu = world.device.type == "cpu"
        size = max(1, SORTED_ELEMENTS // len(gallery)) if on_cpu else len(block)
        parts = zip(similarity.split(size), targets[rows].split(size), strict=True)
        found = [ranks(lambda part=part: [(0, part)], target) for part, target in parts]
        return [torch.cat(part) for part in zip(*found, strict=True)]

    average, released, has_positives, rank1, rank5, places = over_blocks(
        ranked, queries, blocks.queries, world
    )
    return Ranked(
        rank1=100 * rank1.sum().item() / len(queries),
        rank5=100 * rank5.sum().item() / len(queries),
        map=100 * average.mean().item(),
        map_at_100_released=100 * released.mean().item(),
        queries_without_positives=int((~has_positives).sum()),
        average_precision=average,
        first=places,
    )


def ranks_of(
    similarities: Callable[[], Iterable[tuple[int, Tensor]]],
    labels: Tensor,
    by_label: Tensor,
    targets: Tensor,
    first: int,
) -> list[Tensor]:
    """Of each query [b]: AP and AP@100 as released, float64; whether it has positives, whether
    one is at rank 1 and in the first 5; its first places.

    similarities: the gallery in parts, (first place, cosines [b, p]), which may be overwritten; it
    is called again for the ranks where there are several. labels [n] ascending; by_label [n]: the
    places they come from.
    """
    start = torch.searchsorted(labels, targets)
    count = torch.searchsorted(labels, targets, right=True) - start
    # Positives lie side by side in by_label; short rows are filled up, then left out.
    column = torch.arange(max(1, int(count.max())), device=labels.device)
    is_positive = column < count[:, None]
    positives = by_label[(start[:, None] + column).clamp_max(len(labels) - 1)]
    own = torch.zeros_like(positives)  # the positives' keys
    parts = 0
    for place, similarity in similarities():
        parts += 1
        keys = order_keys(similarity, place)
        columns = positives - place
        there = keys.gather(1, columns.clamp(0, keys.shape[1] - 1))
        own = there.where((columns >= 0) & (columns < keys.shape[1]), own)
    ranks, best = torch.ones_like(positives), own[:, :0]
    again = (order_keys(part, place) for place, part in similarities()) if parts > 1 else [keys]
    for keys in map(sort_rows, again):
        ranks += torch.searchsorted(keys, own)
        best = sort_rows(torch.cat([best, keys[:, :first]], dim=1))[:, :first]
    ranks = ranks.masked_fill_(~is_positive, NEVER).sort(dim=1).values
    precision = (column + 1) / ranks.double() * is_positive
    early = ranks <= RELEASED_DEPTH
    return [
        precision.sum(1) / count.clamp_min(1),
        (precision * early).sum(1) / early.sum(1).clamp_min(1),
        count > 0,
        ranks[:, 0] <= 1,
        ranks[:, 0] <= 5,
        best & 0xFFFFFFFF,
    ]


def order_keys(similarity: Tensor, start: int) -> Tensor:
    """int64 [m, n], unlike within a row, that ascend as similarity falls, then as places rise.

    start: the first column's place. The upper half holds a float32's bits in descending order, the
    lower the place: so ties, which are many where the gallery is large, need no care.
    """
    bits = similarity.add_(0.0).view(torch.int32)  # -0 becomes 0, its equal
    falling = torch.where(bits < 0, bits & 0x7FFFFFFF, ~bits)
    keys = falling.long().bitwise_left_shift_(32)
    return keys.bitwise_or_(torch.arange(start, start + keys.shape[1], device=keys.device))


def sort_rows(keys: Tensor) -> Tensor:
    """Each row in ascending order; the argument may be overwritten."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    # NumPy's sort of integers is several times faster than torch's, which sorts places too.
    keys.numpy().sort(axis=1)
    return keys


def divide(split: str, train: int, test: int) -> tuple[Tensor, Tensor]:
    """Gallery and queries, int64 places in train then test.

    split: `standard`, all of train and all of test; or `ratio`, of the released CMD code: every
    ninth test image (the first, the tenth, ...) is a query, and the gallery is all the others.
    """
    places = torch.arange(train + test)
    is_query = places >= train
    if split == "ratio":
        is_query &= (places - train) % 9 == 0
    return places[~is_query], places[is_query]
