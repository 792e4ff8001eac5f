"""Exact search by cosine in bounded memory: blocks of queries against one copy of a gallery.

A block's similarities are all that is ever held of the [queries, gallery] matrix. Blocks have
the same size however many processes share them, so that each gives the same bits everywhere.
"""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from utils.distributed import World, gather_rows, share
from utils.errors import InputError

# Elements of one block of similarities: 2^24 float32 are 64 MiB.
BLOCK_ELEMENTS = 2**24
# The rounded search pays up to this share of the gallery as candidates, judged by as many
# queries. Measured with 768-d features on two cores with avx512_bf16.
CANDIDATES_SHARE, PROBE = 1 / 32, 64


def check(
    gallery: Tensor,
    queries: Tensor,
    gallery_labels: Tensor | None = None,
    query_labels: Tensor | None = None,
) -> None:
    """Raise InputError unless these fit: [n, D], [m, D], and labels, where given, [n], [m].

    And unless all features are finite.
    """
    if gallery.ndim != 2 or queries.ndim != 2 or gallery.shape[1] != queries.shape[1]:
        raise InputError(
            f"the gallery's features {list(gallery.shape)} and the queries' "
            f"{list(queries.shape)} must be [images, D] with the same D."
        )
    if not len(gallery) or not len(queries):
        raise InputError("the gallery or the queries hold no image: nothing can be searched.")
    for features, labels in ((gallery, gallery_labels), (queries, query_labels)):
        if labels is not None and labels.shape != features.shape[:1]:
            raise InputError(f"{len(features)} features have labels {list(labels.shape)}.")
    # Here and not in `unit`, so that of several processes all raise it and not one alone.
    if not all(features.float().norm(dim=1).isfinite().all() for features in (gallery, queries)):
        raise InputError("the features hold infinite or undefined values: nothing can be searched.")


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


class Gallery:
    """Unit features [n, D] float32, searched by blocks of unit queries on the same device."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def similarity(self, queries: Tensor) -> Tensor:
        """Cosines [b, n] float32."""
        return queries @ self.features.T

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines and places [b, k] of the k nearest, equals in the gallery's order."""
        return nearest(self.similarity(queries), k)


class RoundedGallery(Gallery):
    """Finds the same neighbours by a bfloat16 product first, where the processor has one.

    It leaves out only what a bound on its error excludes; the rest is ranked by float32
    cosines. The mean is taken off the gallery, which moves all cosines of a query alike and
    makes the bound several times tighter for features with a common direction. Ours.
    """

    def __init__(self, features: Tensor) -> None:
        super().__init__(features)
        centred = features - features.mean(dim=0)
        self.rounded = centred.bfloat16()
        self._norm = centred.norm(dim=1).max()
        self._error = centred.sub_(self.rounded).norm(dim=1).max()

    def candidates(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Rows and places, in order, of all pairs that can be among the k nearest.

        With E the most by which a float32 cosine and a product before its rounding differ,
        but for a constant of the row: k products are at least the k-th rounded one less half
        a unit in its last place (2^-8 of it at most), so no product more than 2 E below that
        belongs to the k nearest. Rounding keeps order, so rounded products compare alike.
        """
        rounded = queries.bfloat16()
        product = rounded @ self.rounded.T
        kth = product.topk(k, dim=1).values[:, -1].float()
        # Cauchy-Schwarz for the rounding of both factors; the last term is for the float32
        # sums of both products and of what stands here.
        error = (queries - rounded).norm(dim=1) * (self._norm + self._error) + self._error
        error = 1.01 * error + (queries.shape[1] + 8) * 2**-22
        floor = (kth - 2**-8 * kth.abs() - 2 * error).bfloat16()
        rows, places = (product >= floor[:, None]).nonzero().unbind(1)
        return rows, places

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows, places = self.candidates(queries, k)
        counts = rows.bincount(minlength=len(queries))
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse ")
            pairs = torch.sparse_csr_tensor(
                starts,
                places,
                queries.new_zeros(len(places)),
                (len(queries), len(self.features)),
                check_invariants=False,
            )
        exact = torch.sparse.sampled_addmm(pairs, queries, self.features.T, beta=0).values()
        columns = torch.arange(len(rows)) - starts[rows]
        similarity = queries.new_full((len(queries), int(counts.max())), -torch.inf)
        similarity[rows, columns] = exact
        values, columns = nearest(similarity, k)
        return values, places[starts[:-1, None] + columns]


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32."""
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)


def searchable(gallery: Tensor, queries: Tensor, k: int, device: torch.device) -> Gallery:
    """The gallery [n, D] on the device, in the form that finds k neighbours faster."""
    plain = Gallery(unit(gallery, device))
    if device.type != "cpu" or not has_bfloat16():
        return plain
    rounded = RoundedGallery(plain.features)
    probe = unit(queries[:: max(1, len(queries) // PROBE)][:PROBE], device)
    pairs = len(rounded.candidates(probe, k)[0])
    return rounded if pairs <= CANDIDATES_SHARE * len(probe) * len(gallery) else plain


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
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    return [gather_rows(part) for part in joined] if world.size > 1 else joined
