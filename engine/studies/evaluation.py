"""The figures of one network under a study's protocol.

Each image goes through the network once a pooling and, where its parts are known, each test image
once more a kind of map (engine/evaluation/attention.py).
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from datasets import synthetic
from datasets.benchmarks import Splits
from datasets.synthetic_images import COARSE_NAMES
from engine.evaluation.feature_cache import SPLITS, SplitFeatures, coarse_labels
from engine.evaluation.features import Reading
from engine.evaluation.measure import KNN, Retrieval, measure
from engine.evaluation.pointing import Pointing
from engine.evaluation.probing import LinearProbe
from engine.evaluation.source import Source
from engine.studies.spec import Protocol
from utils.config import Node
from utils.distributed import World

COARSE = "coarse_"  # before the name of a figure on the coarse classes


def figures_and_zeros(
    source: Source, cfg: Node, protocol: Protocol, splits: Splits, world: World
) -> tuple[dict[str, float], dict[str, float]]:
    """All figures of a frozen network and, by the same names, their zeros.

    source: on the CPU. cfg: the options of its run, with DATA.PATH the folder that `splits` come
    from; where that has parts.json, coarse classes and the parts' boxes are judged too. Figures
    are percent, but `ratio_*`, the attention on the part over chance. A zero is what guessing
    gives: `pointing_*` that of a random patch, `fixed_*` that of the best one patch for all.
    """
    reading = Reading.of(cfg, world, source)
    knows_parts = (Path(cfg.DATA.PATH) / synthetic.PARTS_FILE).is_file()
    logistic = LinearProbe(
        seed=cfg.SEED,
        classifier="logistic",
        blocks=min(cfg.LINEAR.N_LAST_BLOCKS, len(source.network.backbone.all_blocks())),
        avgpool_patchtokens=cfg.LINEAR.AVGPOOL_PATCHTOKENS,
        cs=cfg.LINEAR.C,
        hold_out=cfg.LINEAR.HOLD_OUT,
        outputs=cfg.LINEAR.NUM_LABELS,
    )
    figures: dict[str, float] = {}
    for pooling in [name for name in protocol.poolings if name in source.poolings()]:
        protocols = {}
        for prefix in ("", COARSE) if knows_parts else ("",):
            coarse = prefix == COARSE
            protocols[prefix, "knn"] = KNN([protocol.k], cfg.KNN.TEMPERATURE, coarse)
            if pooling == "default":
                protocols[prefix, "retrieval"] = Retrieval(cfg.RETRIEVAL.SPLIT, coarse)
                protocols[prefix, "linear"] = replace(logistic, coarse=coarse)
        found = measure(SplitFeatures(source, splits, reading, pooling), list(protocols.values()))
        for (prefix, kind), result in zip(protocols, found, strict=True):
            if kind == "knn":
                top1 = result.figures["k"][str(protocol.k)]["top1"]
                figures[f"{prefix}knn_{pooling}"] = top1
            elif kind == "retrieval":
                figures |= {f"{prefix}{name}": result.figures[name] for name in ("rank1", "map")}
            else:
                figures[f"{prefix}linear"] = result.figures["top1"]
    zeros = guessing(splits, figures, knows_parts)
    if knows_parts:
        (found,) = measure(SplitFeatures(source, splits, reading), [Pointing()])
        for kind, of_kind in found.figures.items():
            chance, mass = of_kind["chance"], of_kind["mass_on_part"]
            figures[f"pointing_{kind}"] = of_kind["accuracy"]
            figures |= {f"mass_{kind}": mass, f"ratio_{kind}": mass / chance}
            zeros |= {f"pointing_{kind}": chance, f"mass_{kind}": chance, f"ratio_{kind}": 1.0}
            zeros[f"fixed_{kind}"] = of_kind["best_fixed_cell"]
    return figures, zeros


def guessing(splits: Splits, names: Iterable[str], knows_coarse: bool) -> dict[str, float]:
    """Chance, percent, for the figures of these names that come from labels.

    For k-NN and probe one class of all; for Rank-1 and mAP the mean over the test images in a
    random order of the training images.
    """
    labels = [torch.tensor(getattr(splits, split).labels) for split in SPLITS]
    zeros = _guessing(*labels, len(splits.train.classes), "")
    if knows_coarse:
        coarse = [coarse_labels(fine, splits.train.classes) for fine in labels]
        zeros |= _guessing(*coarse, len(COARSE_NAMES), COARSE)
    knn = {
        name: zeros[f"{COARSE if name.startswith(COARSE) else ''}linear"]
        for name in names
        if name.removeprefix(COARSE).startswith("knn_")
    }
    return {name: zero for name, zero in (zeros | knn).items() if name in set(names)}


def _guessing(train: Tensor, test: Tensor, classes: int, prefix: str) -> dict[str, float]:
    n = len(train)
    hits = train.bincount(minlength=classes)[test].double()
    found = hits > 0
    harmonic = (1 / torch.arange(1, n + 1, dtype=torch.float64)).sum()
    # The mean of average precision over all orders (ours; by the mean of each place's term).
    precision = (harmonic + (hits - 1) / max(n - 1, 1) * (n - harmonic)) / n
    return {
        f"{prefix}linear": 100 / classes,
        f"{prefix}rank1": 100 * (hits / n)[found].mean().item(),
        f"{prefix}map": 100 * precision[found].mean().item(),
    }
