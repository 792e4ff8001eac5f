"""Exact search by cosine in bounded memory: blocks of queries against one copy of a gallery.

A block's similarities are all that is ever held of the [queries, gallery] matrix. Blocks have
the same size however many processes share them, so that each gives the same bits everywhere.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from utils.distributed import World, gather_objects, gather_rows, share

# Elements of one block of similarities on a CPU: 2^24 float32 are 64 MiB.
BLOCK_ELEMENTS = 2**24
# Queries of one block on a GPU, at most: more make no product faster, and processes share blocks.
MOST_QUERIES = 2**12


class Blocks(NamedTuple):
    """Queries in a block, and rows of the gallery that are on the device at once."""

    queries: int
    gallery: int

    @classmethod
    def that_fit(cls, gallery: int, width: int, each: int, room: int | None) -> "Blocks":
        """Blocks for a gallery of [gallery, width] float32 in `room` bytes of a device.

        Half of the room is for the gallery, whole or a part after the other, and half for what
        is made of similarities, of `each` bytes. Parts and blocks are powers of two, so that a
        little more room does not make other blocks and by them, perhaps, other last bits. room
        None: a CPU, whose gallery is whole and whose blocks have BLOCK_ELEMENTS.
        """
        if room is None:
            return cls(max(1, BLOCK_ELEMENTS // gallery), gallery)
        most = room // 2 // (4 * width)
        # While a part is brought over, the one before is still there.
        part = gallery if gallery <= most else _power_of_two(most // 2)
        return cls(min(MOST_QUERIES, _power_of_two(room // 2 // (each * part))), part)


def _power_of_two(number: int) -> int:
    """The largest that is not above the number; at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def free_bytes(world: World) -> int | None:
    """What every process's GPU still has room for, torch's own reserve included; None on a CPU."""
    if world.device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
    free = torch.cuda.mem_get_info(world.device)[0] + kept
    return min(gather_objects(free)) if world.size > 1 else free


class Gallery:
    """Unit features [n, D], on the device where blocks have room for all of them."""

    def __init__(self, features: Tensor, blocks: Blocks, device: torch.device) -> None:
        self.is_whole = blocks.gallery >= len(features)
        self._rows, self._device = blocks.gallery, device
        self._features = unit(features, device) if self.is_whole else features

    def similarities(self, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Of unit queries [b, D] with each part: the part's first row, cosines [b, p]."""
        for first in range(0, len(self._features), self._rows):
            part = self._features[first : first + self._rows]
            yield first, block @ (part if self.is_whole else unit(part, self._device)).T

    def nearest(self, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest cosines of each unit query, [b, k], and their rows; see `nearest`."""
        values = places = None
        for first, similarity in self.similarities(block):
            found, columns = nearest(similarity, min(k, similarity.shape[1]))
            if values is None:
                values, places = found, columns
                continue
            # Those before are rows before: equals stay in the order of the rows.
            both = torch.cat([values, found], dim=1)
            values, kept = nearest(both, min(k, both.shape[1]))
            places = torch.cat([places, columns + first], dim=1).gather(1, kept)
        return values, places


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
    rows: int,
    world: World,
) -> list[Tensor]:
    """function(unit queries [b, D], their slice) -> tensors [b, ...], over blocks of `rows`.

    world: processes that share the blocks, each with all the features. Returns the function's
    tensors for all queries [m, ...], on the CPU, on every process.
    """
    blocks = [slice(first, first + rows) for first in range(0, len(queries), rows)]

    def results(block: slice) -> list[Tensor]:
        return [part.cpu() for part in function(unit(queries[block], world.device), block)]

    mine = [blocks[index] for index in share(len(blocks), world)]
    # A process without a block learns the shapes from the first.
    parts = [results(block) for block in mine] or [[part[:0] for part in results(blocks[0])]]
    join = gather_rows if world.size > 1 else torch.cat
    return [join(part) for part in zip(*parts, strict=True)]
