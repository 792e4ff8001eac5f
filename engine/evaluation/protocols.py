"""k-NN and retrieval on a frozen network's features; probing.py has the linear probe.

Each takes an open evaluation and gives its figures, percent, as plain data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.evaluation import knn, retrieval
from engine.evaluation.evaluation import Evaluation


@dataclass(frozen=True)
class KnnResult:
    """figures: for JSON. predicted: int64 [m], the best class of each test image for each k."""

    figures: dict
    predicted: dict[int, Tensor]


def run_knn(evaluation: Evaluation) -> KnnResult:
    """k-NN classification of the test split; the training split is the gallery."""
    cfg = evaluation.cfg
    train, test = evaluation.features("train"), evaluation.features("test")
    ranked = knn.rankings(
        train.values,
        train.labels,
        test.values,
        cfg.KNN.KS,
        cfg.KNN.TEMPERATURE,
        len(train.classes),
        evaluation.world,
    )
    figures = {
        "protocol": "k-NN",
        "temperature": cfg.KNN.TEMPERATURE,
        "gallery_images": len(train.labels),
        "test_images": len(test.labels),
        "k": {
            str(k): dict(zip(("top1", "top5"), knn.accuracy(ranking, test.labels), strict=True))
            for k, ranking in ranked.items()
        },
    }
    return KnnResult(figures, {k: ranking[:, 0] for k, ranking in ranked.items()})


@dataclass(frozen=True)
class RetrievalResult:
    """figures: for JSON. queries, gallery: places of the images in `train` then `test`."""

    figures: dict
    measured: retrieval.Retrieval
    queries: Tensor
    gallery: Tensor


def run_retrieval(evaluation: Evaluation) -> RetrievalResult:
    """Rank-1, Rank-5, mAP and mAP@100 as released, on RETRIEVAL.SPLIT."""
    train, test = evaluation.features("train"), evaluation.features("test")
    values = torch.cat([train.values, test.values])
    labels = torch.cat([train.labels, test.labels])
    split = retrieval.SPLITS[evaluation.cfg.RETRIEVAL.SPLIT]
    gallery, queries = split(len(train.labels), len(test.labels))
    measured = retrieval.measure(
        values[gallery],
        labels[gallery],
        values[queries],
        labels[queries],
        world=evaluation.world,
    )
    figures = {
        "protocol": "retrieval",
        "split": evaluation.cfg.RETRIEVAL.SPLIT,
        "gallery_images": len(gallery),
        "queries": len(queries),
        "queries_without_positives": measured.queries_without_positives,
        "rank1": measured.rank1,
        "rank5": measured.rank5,
        "map": measured.map,
        "map_at_100_released": measured.map_at_100_released,
    }
    return RetrievalResult(figures, measured, queries, gallery)
