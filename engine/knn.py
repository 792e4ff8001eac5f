"""Weighted k-nearest-neighbour classification (Wu et al. 2018), the field's quick probe."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one block of similarities: 2^24 float32 are 64 MiB.
BLOCK_ELEMENTS = 2**24


@torch.no_grad()
def knn_accuracy(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: list[int],
    temperature: float = 0.07,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy in percent, for each k.

    gallery [n, D], queries [m, D]: features of any scale, L2-normalised here; labels int64.
    A neighbour votes for its class with exp(cosine / temperature). Ties: neighbours by
    gallery order, classes by index; classes without a vote follow in index order and can be
    top-5 hits, as in the reference. A k above n counts the whole gallery.
    """
    gallery, queries = F.normalize(gallery.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes = int(max(gallery_labels.max(), query_labels.max())) + 1
    most = min(max(ks), len(gallery))
    hits = {k: torch.zeros(2, dtype=torch.long) for k in ks}
    block = max(1, BLOCK_ELEMENTS // max(1, len(gallery)))
    for first in range(0, len(queries), block):
        similarity = queries[first : first + block] @ gallery.T
        targets = query_labels[first : first + block]
        values, places = nearest(similarity, most)
        votes = (values / temperature).exp()
        labels = gallery_labels[places]
        for k in ks:
            scores = votes.new_zeros(len(targets), classes)
            scores.scatter_add_(1, labels[:, :k], votes[:, :k])
            ranking = scores.sort(dim=1, descending=True, stable=True).indices[:, :5]
            correct = ranking == targets[:, None]
            hits[k] += torch.stack([correct[:, 0].sum(), correct.any(1).sum()]).cpu()
    return {
        k: tuple(100 * count / len(queries) for count in hit.tolist()) for k, hit in hits.items()
    }


def nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, [m, k] values and places; equals in the order of the columns.

    torch.topk does not say which of equal values it takes, nor in what order. The few rows
    where that matters are sorted in full.
    """
    places = similarity.topk(k, dim=1).indices.sort(dim=1).values
    values = similarity.gather(1, places)
    last = values.amin(dim=1, keepdim=True)
    unclear = (similarity == last).sum(1) > (values == last).sum(1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    places = places.gather(1, order)
    if unclear.any():
        whole = similarity[unclear].sort(dim=1, descending=True, stable=True)
        values[unclear], places[unclear] = whole.values[:, :k], whole.indices[:, :k]
    return values, places
