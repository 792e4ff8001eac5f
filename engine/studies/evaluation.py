"""The figures of one network under a study's protocol, and beside each its zero."""

from dataclasses import replace

import torch
from torch import Tensor

from datasets import synthetic
from datasets.splits import Splits
from datasets.synthetic_images import COARSE_NAMES
from engine.evaluation.feature_cache import SplitFeatures, coarse_labels
from engine.evaluation.features import Reading
from engine.evaluation.measure import KNN, Retrieval, measure
from engine.evaluation.pointing import Pointing
from engine.evaluation.probing import LinearProbe
from engine.evaluation.source import Source
from engine.studies.spec import Protocol
from utils.config import Node

COARSE = "coarse_"  # before the name of a figure on the coarse classes


def figures_and_zeros(
    source: Source, splits: Splits, reading: Reading, cfg: Node, protocol: Protocol
) -> tuple[dict[str, float], dict[str, float], dict[str, list[str]]]:
    """All figures of a frozen network; by the same names their zeros, and remarks where there are.

    cfg: the options of its run. Of the synthetic set coarse classes and the parts' boxes are
    evaluated too. Figures are percent, but `ratio_*`, the attention on the part over chance. A zero
    is what guessing gives: `pointing_*` a random patch, `fixed_*` the best one patch for all.
    """
    figures: dict[str, float] = {}
    zeros: dict[str, float] = {}
    remarks: dict[str, list[str]] = {}
    options = cfg.LINEAR.clone()
    options.CLASSIFIER = "logistic"
    options.N_LAST_BLOCKS = min(options.N_LAST_BLOCKS, source.network.backbone.depth)
    probe = LinearProbe(options, seed=cfg.SEED)
    labels = [images.labels for images in (splits.train, splits.test)]
    classes = splits.train.classes
    guesses = {"": guessing(*labels, len(classes))}
    knows_parts = (splits.train.root.parent / synthetic.PARTS_FILE).is_file()
    if knows_parts:
        coarse = [coarse_labels(fine, classes) for fine in labels]
        guesses[COARSE] = guessing(*coarse, len(COARSE_NAMES))
    for pooling in protocol.poolings:
        if pooling not in source.poolings():
            continue
        features = SplitFeatures(source, splits, reading, pooling)
        for prefix, guess in guesses.items():
            labelled = replace(features, coarse=prefix == COARSE)
            protocols = [KNN([protocol.k], cfg.KNN.TEMPERATURE)]
            if pooling == "default":
                protocols += [Retrieval(cfg.RETRIEVAL.SPLIT), probe]
            knn, *others = (found.figures for found in measure(labelled, protocols))
            of_knn = knn["k"][str(protocol.k)]
            remarks[f"{prefix}knn_{pooling}"] = of_knn["remarks"]
            figures[f"{prefix}knn_{pooling}"] = of_knn["top1"]
            zeros[f"{prefix}knn_{pooling}"] = guess["linear"]
            if others:
                retrieval, probed = others
                remarks |= {f"{prefix}{name}": retrieval["remarks"] for name in ("rank1", "map")}
                remarks[f"{prefix}linear"] = probed["remarks"]
                figures |= {f"{prefix}{name}": retrieval[name] for name in ("rank1", "map")}
                figures[f"{prefix}linear"] = probed["top1"]
                zeros |= {f"{prefix}{name}": zero for name, zero in guess.items()}
    if knows_parts:
        (found,) = measure(SplitFeatures(source, splits, reading), [Pointing()])
        for kind, seen in found.figures.items():
            chance, mass = seen["chance"], seen["mass_on_part"]
            figures[f"pointing_{kind}"] = seen["accuracy"]
            figures |= {f"mass_{kind}": mass, f"ratio_{kind}": mass / chance}
            zeros |= {f"pointing_{kind}": chance, f"mass_{kind}": chance, f"ratio_{kind}": 1.0}
            zeros[f"fixed_{kind}"] = seen["best_fixed_cell"]
    return figures, zeros, {name: said for name, said in remarks.items() if said}


def guessing(train: Tensor, test: Tensor, classes: int) -> dict[str, float]:
    """Chance, percent, for labels [n] and [m]: of a classifier, and of Rank-1 and mAP.

    A classifier (`linear`) hits one class of all; `rank1` and `map` are means over the test images
    in a random order of the training images.
    """
    n = len(train)
    hits = train.bincount(minlength=classes)[test].double()
    found = hits > 0
    harmonic = (1 / torch.arange(1, n + 1, dtype=torch.float64)).sum()
    # The mean of average precision over all orders (ours; by the mean of each place's term).
    precision = (harmonic + (hits - 1) / max(n - 1, 1) * (n - harmonic)) / n
    return {
        "linear": 100 / classes,
        "rank1": 100 * (hits / n)[found].mean().item(),
        "map": 100 * precision[found].mean().item(),
    }
