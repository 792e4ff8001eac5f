"""The figures of one network under a study's protocol.

Each image goes through the network once a pooling and, where its parts are known, each test image
once more a kind of map (engine/evaluation/attention.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from datasets import synthetic
from datasets.benchmarks import Splits
from datasets.folder import LabelledImages
from datasets.loader import usable_workers
from datasets.multicrop import eval_transform
from datasets.synthetic_images import COARSE_NAMES
from engine.evaluation import attention, pointing
from engine.evaluation.evaluation import SPLITS, Evaluation, build_evaluation
from engine.evaluation.feature_cache import Features
from engine.evaluation.features import extract
from engine.evaluation.probing import run_linear
from engine.evaluation.protocols import run_knn, run_retrieval
from engine.evaluation.source import Source, image_size
from engine.studies.spec import Protocol
from utils.config import Node
from utils.distributed import World

COARSE = "coarse_"  # before the name of a figure on the coarse classes


@dataclass
class CoarseEvaluation(Evaluation):
    """`fine` with the coarse classes for labels; the features are its own."""

    fine: Evaluation | None = None

    @classmethod
    def of(cls, fine: Evaluation) -> "CoarseEvaluation":
        world, source, splits = fine.world, fine.source, fine.splits
        return cls(fine.cfg, world, source, splits, fine.size, fine.resize, fine=fine)

    def features(self, split: str, blocks: int = 1, avgpool_patchtokens: bool = False) -> Features:
        """As in Evaluation; labels index COARSE_NAMES."""
        held = self.fine.features(split, blocks, avgpool_patchtokens)
        return replace(
            held, labels=coarse_labels(held.labels, held.classes), classes=[*COARSE_NAMES]
        )


def coarse_labels(labels: Tensor, classes: list[str]) -> Tensor:
    """Fine labels [n] -> the places in COARSE_NAMES of what their names begin with, to "_"."""
    places = [COARSE_NAMES.index(name.split("_", 1)[0]) for name in classes]
    return torch.tensor(places)[labels]


def measure(
    source: Source, cfg: Node, protocol: Protocol, splits: Splits, world: World
) -> tuple[dict[str, float], dict[str, float]]:
    """All figures of a frozen network and, by the same names, their zeros.

    source: on the CPU. cfg: the options of its run, with DATA.PATH the folder that `splits` come
    from; where that has parts.json, coarse classes and the parts' boxes are judged too. Figures
    are percent, but `ratio_*`, the attention on the part over chance. A zero is what guessing
    gives: `pointing_*` that of a random patch, `fixed_*` that of the best one patch for all.
    """
    options = cfg.clone()
    options.KNN.KS = [protocol.k]
    options.EVAL.POOLING = "default"
    options.LINEAR.CLASSIFIER = "logistic"
    blocks = min(options.LINEAR.N_LAST_BLOCKS, len(source.network.backbone.all_blocks()))
    options.LINEAR.N_LAST_BLOCKS = blocks
    knows_parts = (Path(cfg.DATA.PATH) / synthetic.PARTS_FILE).is_file()

    figures: dict[str, float] = {}
    for pooling in [name for name in protocol.poolings if name in source.poolings()]:
        own = options.clone()
        own.EVAL.POOLING = pooling
        fine = build_evaluation(own, world, source, splits, None)
        if pooling == "default":
            # The probe's features hold the image feature too: they are extracted first, and once.
            for split in SPLITS:
                fine.features(split, blocks, own.LINEAR.AVGPOOL_PATCHTOKENS)
        labellings = {"": fine} | ({COARSE: CoarseEvaluation.of(fine)} if knows_parts else {})
        for prefix, evaluation in labellings.items():
            knn = run_knn(evaluation).figures["k"][str(protocol.k)]["top1"]
            figures[f"{prefix}knn_{pooling}"] = knn
            if pooling != "default":
                continue
            retrieval = run_retrieval(evaluation).figures
            figures |= {f"{prefix}{name}": retrieval[name] for name in ("rank1", "map")}
            probed = run_linear(evaluation, 1.0, cfg.SEED, Path())
            figures[f"{prefix}linear"] = probed["top1"]
    zeros = guessing(splits, figures, knows_parts)
    if knows_parts:
        seen, guessed = _attention(source, options, splits.test, world)
        figures |= seen
        zeros |= guessed
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


def _attention(
    source: Source, cfg: Node, test: LabelledImages, world: World
) -> tuple[dict[str, float], dict[str, float]]:
    """Where each kind of map looks on whole test images, and the zeros of that."""
    network = source.network.to(world.device)
    size, kinds = image_size(source, cfg.EVAL.SIZE), attention.kinds(network)

    def maps_of(images: Tensor) -> Tensor:
        return torch.stack([attention.attention_map(network, images, k) for k in kinds], dim=1)

    maps = extract(
        maps_of,
        test.through(eval_transform(size, size)),
        world,
        cfg.EVAL.BATCH_SIZE_PER_GPU,
        usable_workers(cfg.DATA.WORKERS),
    ).values
    boxes, box_size = pointing.part_boxes([test.root / path for path in test.paths])
    cell = network.backbone.stride * box_size / size
    touching = pointing.cells_touching(boxes, network.backbone.patch_grid(size, size), cell)
    figures, zeros = {}, {}
    chance = pointing.chance(touching)
    for place, kind in enumerate(kinds):
        mass = pointing.mass_on_part(maps[:, place], touching)
        figures[f"pointing_{kind}"] = pointing.pointing(maps[:, place], touching)
        figures[f"mass_{kind}"] = mass
        figures[f"ratio_{kind}"] = mass / chance
        zeros |= {f"pointing_{kind}": chance, f"mass_{kind}": chance, f"ratio_{kind}": 1.0}
        zeros[f"fixed_{kind}"] = pointing.best_fixed_cell(touching)
    return figures, zeros
