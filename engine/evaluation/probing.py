"""The linear probe as a protocol: features by augmentation or kept ones, resume, its figures."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from datasets.folder import LabelledImages
from datasets.loader import AugmentedDataset, BadImage, EpochSampler, build_loader, usable_workers
from datasets.multicrop import RandomCrop
from engine.evaluation import linear
from engine.evaluation.evaluation import Evaluation
from engine.evaluation.feature_cache import Features
from engine.evaluation.features import Encoder, check_bad
from utils import checkpoint, distributed
from utils.errors import InputError
from utils.files import make_folder
from utils.logging import RunLog, logger

STATE = "linear.pth"
LOG_PREFIX = "linear_"
LINES = 20  # on the screen for each probe; its log has every test

Batches = Iterator[tuple[Tensor, Tensor, Tensor]]  # features [b, D], labels [b], indices [b]


@dataclass
class AugmentedImages:
    """The training split, through the network again in every epoch, each time another crop."""

    evaluation: Evaluation
    network: Encoder
    images: LabelledImages
    seed: int
    bad: set[BadImage] = field(default_factory=set)

    @property
    def fingerprint(self) -> str:
        """What the probe is trained on, to compare by."""
        return self.images.fingerprint

    @property
    def labels(self) -> Tensor:
        return torch.tensor(self.images.labels)

    def batches(self, sampler: EpochSampler, width: int) -> Batches:
        """Features of this process's share of every batch, on the device."""
        evaluation, device = self.evaluation, self.evaluation.world.device
        crops = AugmentedDataset(self.images, RandomCrop(evaluation.size), self.seed)
        workers = usable_workers(evaluation.cfg.DATA.WORKERS)
        function, labels = evaluation.function(self.network), self.labels.to(device)
        loader = build_loader(crops, sampler, workers, pin_memory=device.type == "cuda")
        for batch in loader:
            self.bad.update(batch.bad)
            indices = batch.indices.to(device, non_blocking=True)
            values = torch.empty(0, width, device=device)
            if batch.data is not None:
                with torch.no_grad():
                    values = function(batch.data.to(device, non_blocking=True)).float()
            yield values, labels[indices], indices

    def check(self) -> None:
        """Raise InputError where the processes have met more unreadable images than allowed."""
        check_bad(_all_bad(self), len(self.images), self.evaluation.cfg.DATA.MAX_BAD)

    def plain(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, D] and labels [n] of these images' centre crops.

        Those that cannot be read are left out: as part of all, training has judged them.
        """
        subset = self.images.subset(indices.tolist())
        extracted = self.evaluation.extract(self.network, subset, max_bad=1)
        return extracted.values, extracted.labels


@dataclass
class CachedFeatures:
    """The training split's centre crops, through the network once."""

    features: Features
    device: torch.device
    bad: frozenset[BadImage] = frozenset()

    @property
    def fingerprint(self) -> str:
        """What the probe is trained on, to compare by."""
        return str(self.features.made_by)

    @property
    def labels(self) -> Tensor:
        return self.features.labels

    def batches(self, sampler: EpochSampler, width: int) -> Batches:
        """This process's share of every batch, on the device."""
        values, labels = self.features.values.to(self.device), self.labels.to(self.device)
        for keys in sampler:
            indices = torch.tensor([index for _, index in keys], dtype=torch.int64)
            indices = indices.to(self.device)
            yield values[indices], labels[indices], indices

    def plain(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, D] and labels [n] of these images."""
        return self.features.values[indices], self.labels[indices]


def share_folder(folder: Path, share: float) -> Path:
    """Where the probe with a share of the labels keeps its files in a results folder; made."""
    own = folder if share == 1 else folder / f"labels_{100 * share:g}_percent"
    distributed.on_main(lambda: make_folder(own))
    return own


def run_linear(evaluation: Evaluation, share: float, seed: int, folder: Path) -> dict:
    """A linear probe on `share` of every class's training images, by the options LINEAR.*.

    folder: for its log and its state, from which the same probe goes on.
    Returns its figures. Raises InputError where the folder holds another probe's state.
    """
    cfg = evaluation.cfg.LINEAR
    started = time.perf_counter()
    test = _features(evaluation, "test")
    outputs = _outputs(cfg.NUM_LABELS, test.classes)
    if cfg.CLASSIFIER == "sgd" and cfg.FEATURES == "augmented":
        source = AugmentedImages(
            evaluation,
            evaluation.encoder(cfg.N_LAST_BLOCKS, cfg.AVGPOOL_PATCHTOKENS),
            evaluation.dataset("train"),
            seed,
        )
    else:
        source = CachedFeatures(_features(evaluation, "train"), evaluation.world.device)
    labels = source.labels
    logger.info(f"linear probe, {100 * share:g} % of the labels, seed {seed}")
    if cfg.CLASSIFIER == "sgd" and len(cfg.SWEEP) > 1:
        logger.info(f"top-1 below is for the base rates {'  '.join(f'{lr:g}' for lr in cfg.SWEEP)}")
    used = torch.arange(len(labels)) if share == 1 else linear.stratified(labels, share, seed)
    figures = {
        "protocol": "linear probe",
        "classifier": cfg.CLASSIFIER,
        "features": "cached" if isinstance(source, CachedFeatures) else "augmented",
        "label_share": share,
        "seed": seed,
        "test_images": len(test.labels),
        "outputs": outputs,
    }
    if cfg.CLASSIFIER == "logistic":
        figures |= _logistic(evaluation, source, used, test, outputs, seed)
    else:
        figures |= _sgd(evaluation, source, used, test, outputs, seed, folder)
    bad = _all_bad(source)
    if bad:
        listed = {*evaluation.bad.get("train", []), *(str(image) for image in bad)}
        evaluation.bad["train"] = sorted(listed)
        logger.warning(f"{len(bad)} unreadable training images were left out; results list them")
    figures["train_images"] = len(used) - len(bad)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    return figures


def _all_bad(source: AugmentedImages | CachedFeatures) -> set[BadImage]:
    """The unreadable images that any process has met so far."""
    return set().union(*distributed.gather_objects(set(source.bad)))


def _features(evaluation: Evaluation, split: str) -> Features:
    cfg = evaluation.cfg.LINEAR
    return evaluation.features(split, cfg.N_LAST_BLOCKS, cfg.AVGPOOL_PATCHTOKENS)


def _outputs(wanted: int, classes: list[str]) -> int:
    if wanted and wanted < len(classes):
        raise InputError(
            f"--num_labels {wanted} is less than the {len(classes)} classes of the data: leave it "
            f"out to have as many as the data has."
        )
    return wanted or len(classes)


def _held_out(evaluation: Evaluation, labels: Tensor, used: Tensor, seed: int) -> Tensor:
    """Indices of the used training images on which settings are compared."""
    mask = linear.hold_out(labels[used], evaluation.cfg.LINEAR.HOLD_OUT, seed)
    if not mask.any():
        raise InputError(
            "no training image can be held out to choose by: every class has just one. Give one "
            "learning rate or C."
        )
    return used[mask]


def _sgd(
    evaluation: Evaluation,
    source: AugmentedImages | CachedFeatures,
    used: Tensor,
    test: Features,
    outputs: int,
    seed: int,
    folder: Path,
) -> dict:
    """Train the heads, or go on with them, and choose among the learning rates."""
    cfg, world = evaluation.cfg, evaluation.world
    recipe = linear.Recipe(
        lrs=tuple(cfg.LINEAR.SWEEP or [cfg.LINEAR.BASE_LR]),
        epochs=cfg.LINEAR.EPOCHS,
        batch=cfg.EVAL.BATCH_SIZE_PER_GPU * world.size,
        val_freq=cfg.LINEAR.VAL_FREQ,
        outputs=outputs,
        seed=seed,
    )
    held_out = torch.zeros(len(source.labels), dtype=torch.bool)
    if recipe.has_twins:
        held_out[_held_out(evaluation, source.labels, used, seed)] = True
    probe = linear.Probe(recipe, test.values.shape[1], held_out, world)
    settings = {
        **{name: str(value) for name, value in asdict(recipe).items()},
        **{f"test {name}": value for name, value in test.made_by.items()},
        "blocks": str(len(test.widths)),
        "mean of patches": str(test.avgpool_patchtokens),
        "held out": str(cfg.LINEAR.HOLD_OUT if recipe.has_twins else 0),
        "training features": type(source).__name__,
        "training images": str(len(used)),
        "training data": source.fingerprint,
    }
    _resume(probe, source, settings, folder)
    distributed.agree(
        {"the epoch to go on from": probe.epoch}, "put --output_dir where all of them see it"
    )
    sampler = EpochSampler(used.tolist(), recipe.batch, world, seed, probe.epoch, recipe.epochs)
    _train(probe, source, sampler, test, settings, folder)

    heads = [{"base_lr": lr} for lr in recipe.lrs]
    for index, head in enumerate(heads):
        head |= _over_epochs(probe.history, index)
    figures = {"epochs": recipe.epochs, "batch": recipe.batch}
    if not recipe.has_twins:
        return {**figures, **heads[0], "sweep": []}
    values, labels = source.plain(held_out.nonzero().flatten())
    scores = probe.accuracy(values, labels)[0][len(heads) :]
    for head, score in zip(heads, scores, strict=True):
        head["held_out_top1"] = score
    sound = probe.finite()
    usable = [i for i in range(len(heads)) if sound[i] and sound[len(heads) + i]]
    if not usable:
        raise InputError("every learning rate of --sweep made the probe diverge: give lower ones.")
    chosen = heads[max(usable, key=scores.__getitem__)]
    return {**figures, "held_out_images": len(labels), **chosen, "sweep": heads}


def _over_epochs(history: list[dict], head: int) -> dict:
    """The last test, and the best in top-1: the first of equals."""
    best = max(history, key=lambda line: line["top1"][head])
    return {
        "top1": history[-1]["top1"][head],
        "top5": history[-1]["top5"][head],
        "best_top1": best["top1"][head],
        "best_epoch": best["epoch"],
    }


def _train(
    probe: linear.Probe,
    source: AugmentedImages | CachedFeatures,
    sampler: EpochSampler,
    test: Features,
    settings: dict[str, str],
    folder: Path,
) -> None:
    """All epochs that are left: train, test, log, keep the state."""
    recipe = probe.recipe
    every = max(recipe.val_freq, recipe.epochs // LINES)
    batches = source.batches(sampler, probe.width)
    log = None
    if probe.world.is_main:
        log = RunLog(folder, len(probe.history), probe.epoch, LOG_PREFIX)
    while probe.epoch < recipe.epochs:
        loss = probe.train_epoch(batches, sampler.batches_per_epoch).item()
        if isinstance(source, AugmentedImages):
            source.check()
        if not math.isfinite(loss) and not recipe.has_twins:
            raise InputError(
                f"the probe's loss is {loss} at epoch {probe.epoch}: lower its learning rate, --lr."
            )
        if probe.epoch % recipe.val_freq and probe.epoch < recipe.epochs:
            continue
        scores = probe.accuracy(test.values, test.labels)
        top1, top5 = (heads[: len(recipe.lrs)] for heads in scores)
        probe.history.append({"epoch": probe.epoch, "top1": top1, "top5": top5})
        if log:
            figures = {"epoch": probe.epoch, "loss": loss}
            for lr, one, five in zip(recipe.lrs, top1, top5, strict=True):
                suffix = f"_lr{lr:g}" if recipe.has_twins else ""
                figures |= {f"top1{suffix}": one, f"top5{suffix}": five}
            log.write(probe.epoch, figures)
        bad = [asdict(image) for image in _all_bad(source)]
        state = {"probe": settings, "bad": bad, **probe.state()}
        distributed.on_main(lambda state=state: checkpoint.save(state, folder / STATE))
        if probe.epoch % every and probe.epoch < recipe.epochs:
            continue
        logger.info(
            f"epoch {probe.epoch}/{recipe.epochs}  loss {loss:.4f}  top-1 "
            + "  ".join(f"{score:.2f}" for score in top1)
            + " %"
        )
    if log:
        log.close()


def _resume(
    probe: linear.Probe,
    source: AugmentedImages | CachedFeatures,
    settings: dict[str, str],
    folder: Path,
) -> None:
    """Go on from the state in `folder`, if there is one and it is of this probe."""
    path = folder / STATE
    if not path.exists():
        return
    state = checkpoint.load_file(path)
    stored = state.get("probe") if isinstance(state, dict) else None
    if not isinstance(stored, dict):
        raise InputError(f"{path} is not a linear probe: choose another --output_dir.")
    different = [name for name in settings if stored.get(name) != settings[name]]
    if different:
        raise InputError(
            f"{folder} holds a probe of other settings ({', '.join(different)} differ): choose "
            f"another --output_dir, or remove {path} to start anew there."
        )
    probe.load_state(state)
    if isinstance(source, AugmentedImages):
        source.bad.update(BadImage(**image) for image in state["bad"])
    logger.info(f"going on with the probe in {path} at epoch {probe.epoch}")


def _logistic(
    evaluation: Evaluation,
    source: CachedFeatures,
    used: Tensor,
    test: Features,
    outputs: int,
    seed: int,
) -> dict:
    """Logistic regression; of several C the best on held-out training images, refitted on all.

    Every process does all of it: one alone could take longer than the others may wait.
    """
    cs, comparison = evaluation.cfg.LINEAR.C, []
    if len(cs) > 1:
        held = _held_out(evaluation, source.labels, used, seed)
        kept = used[~torch.isin(used, held)]
        for c in cs:
            scores = linear.logistic_scores(*source.plain(kept), source.plain(held)[0], outputs, c)
            top1 = linear.top_accuracy(scores, source.labels[held])[0]
            comparison.append({"C": c, "held_out_top1": top1})
    chosen = max(comparison, key=lambda line: line["held_out_top1"])["C"] if comparison else cs[0]
    scores = linear.logistic_scores(*source.plain(used), test.values, outputs, chosen)
    top1, top5 = linear.top_accuracy(scores, test.labels)
    return {"C": chosen, "top1": top1, "top5": top5, "sweep": comparison}
