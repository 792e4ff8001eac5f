"""Exact search by cosine in bounded memory: blocks of queries against one copy of a gallery.

A block's similarities are all that is ever held of the [queries, gallery] matrix. Blocks have
the same size however many processes share them, so that each gives the same bits everywhere.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from utils.distributed import World, gather_rows, share

# Elements of one block of similarities: 2^24 float32 are 64 MiB.
BLOCK_ELEMENTS = 2**24


def unit(features: Tensor, device: torch.device) -> Tensor:
    """A float32 copy [n, D] on the device, L2-normalised; zeros stay zeros."""
    features = features.to(device, torch.float32, copy=True)
    return features.div_(features.norm(dim=1, keepdim=True).clamp_min(1e-12))


def nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, [m, k] values and places; equals in the order of the columns.

    torch.topk does not say which of equal values it takes, nor in what order: a row whose
    k-th and next value are equal is looked at again.
    """
    values, places = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    places = places[:, :k]
    if values.shape[1] > k:
        unclear = values[:, k - 1] == values[:, k]
        if unclear.any():
            rows, last = similarity[unclear], values[unclear, k - 1, None]
            above, equal = rows > last, rows == last
            room = k - above.sum(1, keepdim=True)
            taken = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
            places[unclear] = taken.nonzero()[:, 1].view(-1, k)
    places = places.sort(dim=1).values
    values, order = similarity.gather(1, places).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def over_blocks(
    function: Callable[[Tensor, slice], Iterable[Tensor]],
    queries: Tensor,
    width: int,
    world: World,
) -> list[Tensor]:
    """function(unit queries [b, D], their slice) -> tensors [b, ...], over all blocks of queries.

    width: elements that the function holds for a query. world: processes that share the
    blocks, each with all the features. Returns the function's tensors for all queries [m, ...],
    on the CPU, on every process.
    """
    rows = max(1, BLOCK_ELEMENTS // width)
    blocks = [slice(first, first + rows) for first in range(0, len(queries), rows)]

    def results(block: slice) -> list[Tensor]:
        return [part.cpu() for part in function(unit(queries[block], world.device), block)]

    mine = [blocks[index] for index in share(len(blocks), world)]
    # A process without a block learns the shapes from the first.
    parts = [results(block) for block in mine] or [[part[:0] for part in results(blocks[0])]]
    join = gather_rows if world.size > 1 else torch.cat
    return [join(part) for part in zip(*parts, strict=True)]
