"""The one way to a figure: protocols, each a declaration, on the features of a frozen network."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.evaluation import knn, retrieval
from engine.evaluation.feature_cache import SPLITS, Found, SplitFeatures
from engine.evaluation.pointing import Pointing
from engine.evaluation.probing import LinearProbe
from utils.logging import logger


@dataclass(frozen=True)
class KNNFigures(Found):
    """predicted: int64 [m], the best class of each test image for each k."""

    predicted: dict[int, Tensor]


@dataclass(frozen=True)
class KNN:
    """k-NN classification of the test split; the training split is the gallery."""

    ks: Sequence[int]
    temperature: float = 0.07

    def measure(self, features: SplitFeatures) -> KNNFigures:
        train, test = features.of("train"), features.of("test")
        ranked = knn.rankings(
            train.values,
            train.labels,
            test.values,
            self.ks,
            self.temperature,
            len(train.classes),
            features.reading.world,
        )
        scores = {k: knn.accuracy(ranking, test.labels) for k, ranking in ranked.items()}
        gallery = len(train.labels)
        remarks = {k: [] for k in self.ks}
        for k in self.ks:
            if k > gallery:
                remarks[k] = [f"{k}-NN: the gallery has {gallery} images, and all of them vote"]
                _warn_once(*remarks[k])
        figures = {
            "protocol": "k-NN",
            "temperature": self.temperature,
            "gallery_images": gallery,
            "test_images": len(test.labels),
            "k": {
                str(k): {
                    "top1": top1,
                    "top5": top5,
                    "neighbours": min(k, gallery),
                    "remarks": remarks[k],
                }
                for k, (top1, top5) in scores.items()
            },
        }
        return KNNFigures(figures, {k: ranking[:, 0] for k, ranking in ranked.items()})


@functools.cache  # once for all networks and epochs
def _warn_once(line: str) -> None:
    logger.warning(line)


@dataclass(frozen=True)
class RetrievalFigures(Found):
    """queries, gallery: places of the images in `train` then `test`."""

    ranked: retrieval.Ranked
    queries: Tensor
    gallery: Tensor


@dataclass(frozen=True)
class Retrieval:
    """Rank-1, Rank-5, mAP and mAP@100 as released; split: as in `divide`."""

    split: str = "standard"

    def measure(self, features: SplitFeatures) -> RetrievalFigures:
        train, test = features.of("train"), features.of("test")
        values = torch.cat([train.values, test.values])
        labels = torch.cat([train.labels, test.labels])
        gallery, queries = retrieval.divide(self.split, len(train.labels), len(test.labels))
        ranked = retrieval.retrieve(
            values[gallery],
            labels[gallery],
            values[queries],
            labels[queries],
            world=features.reading.world,
        )
        figures = {
            "protocol": "retrieval",
            "split": self.split,
            "gallery_images": len(gallery),
            "queries": len(queries),
            "queries_without_positives": ranked.queries_without_positives,
            "rank1": ranked.rank1,
            "rank5": ranked.rank5,
            "map": ranked.map,
            "map_at_100_released": ranked.map_at_100_released,
        }
        if lone := ranked.queries_without_positives:
            figures["remarks"] = [
                f"{lone} of {len(queries)} queries have no image of their class in the gallery: "
                f"they count as not found"
            ]
        return RetrievalFigures(figures, ranked, queries, gallery)


def measure(
    features: SplitFeatures, protocols: Sequence[KNN | Retrieval | LinearProbe | Pointing]
) -> list[Found]:
    """What each protocol finds, in order; `figures` of each are percent and plain data.

    `remarks` among them are sentences that qualify them: whoever shows a figure shows these beside
    it. Every image goes through the network once for all protocols on features of centre crops.
    """
    for protocol in protocols:
        # A probe's features hold the image feature too: they are extracted first.
        if isinstance(protocol, LinearProbe):
            for split in ("test",) if protocol.augmented else SPLITS:
                protocol.features_of(features, split)
    found = [protocol.measure(features) for protocol in protocols]
    for protocol, each in zip(protocols, found, strict=True):
        if not isinstance(protocol, Pointing):
            for figures in (each.figures, *each.figures.get("k", {}).values()):
                figures["remarks"] = of_splits(features) + figures.get("remarks", [])
    return found


def of_splits(features: SplitFeatures) -> list[str]:
    """Remarks on classes of the data that a split lacks, and on features that are all alike."""
    remarks = []
    for split in SPLITS:
        if split in features.held:
            images = features.of(split)
            if images.are_alike:
                remarks.append(f"the features of all images of the {split} split are alike")
        else:
            images = features.images(split)
        absent = len(images.classes) - len(images.labels.unique())
        if absent:
            count = len(images.classes)
            remarks.append(f"{absent} of {count} classes have no image in the {split} split")
    return remarks
