"""The linear probe as a protocol: features by augmentation or kept ones, resume, its figures."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from datasets.folder import LabelledImages
from datasets.loader import BadImage, EpochSampler, augmented, build_loader
from datasets.multicrop import RandomCrop
from engine.evaluation import linear
from engine.evaluation.feature_cache import Features, Found, SplitFeatures
from engine.evaluation.features import Encoder, Reading, check_bad
from utils import checkpoint, distributed
from utils.config import Node
from utils.errors import InputError
from utils.files import write_text
from utils.lock import claim
from utils.logging import logger

STATE = "linear.pth"
LINES = 20  # on the screen, at most; the log has every test
LOG = "linear_log.txt"

Batches = Iterator[tuple[Tensor, Tensor, Tensor]]  # features [b, D], labels [b], indices [b]


@dataclass
class AugmentedImages:
    """The training split, through the network again in every epoch, each time another crop."""

    encoder: Encoder
    images: LabelledImages
    reading: Reading
    seed: int
    bad: set[BadImage] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.labels, self.fingerprint = self.images.labels, self.images.fingerprint

    def batches(self, sampler: EpochSampler, width: int) -> Batches:
        """Features of this process's share of every batch, on the device."""
        device = self.reading.world.device
        crops = augmented(
            self.images, RandomCrop(self.reading.size, self.reading.normalisation), self.seed
        )
        function, labels = self.reading.cast(self.encoder), self.labels.to(device)
        is_cuda = device.type == "cuda"
        for batch in build_loader(crops, sampler, self.reading.workers, pin_memory=is_cuda):
            self.bad.update(batch.bad)
            indices = batch.indices.to(device, non_blocking=True)
            values = torch.empty(0, width, device=device)
            if batch.data is not None:
                values = function(batch.data.to(device, non_blocking=True)).float()
            yield values, labels[indices], indices

    def plain(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, D] and labels [n] of these images' centre crops.

        Those that cannot be read are left out: as part of all, training has judged them.
        """
        subset = self.images.subset(indices)
        extracted = replace(self.reading, max_bad=1).extract(self.encoder, subset)
        return extracted.values, extracted.labels


@dataclass
class CachedFeatures:
    """The training split's centre crops, through the network once."""

    features: Features
    device: torch.device
    bad: set[BadImage] = field(default_factory=set)  # of an epoch: none, they were left out

    def __post_init__(self) -> None:
        self.labels, self.fingerprint = self.features.labels, str(self.features.made_by)

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


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on `share` of every class's training images; see docs/evaluation.md.

    options: LINEAR.*; of several base learning rates or C, the best on held-out training images
    counts. folder: of results; below it are the log and the state of sgd, from which the same
    probe goes on.
    """

    options: Node
    share: float = 1.0
    seed: int = 0
    folder: Path | None = None

    @property
    def augmented(self) -> bool:
        """Whether every epoch has new crops of the training images: sgd alone can."""
        return self.options.CLASSIFIER == "sgd" and self.options.FEATURES == "augmented"

    @property
    def own_folder(self) -> Path:
        """Where the log and the state are."""
        all_labels = self.share == 1
        return self.folder if all_labels else self.folder / f"labels_{100 * self.share:g}_percent"

    def features_of(self, features: SplitFeatures, split: str) -> Features:
        """The centre crops' features that the probe takes."""
        own = self.options
        return features.of(split, own.N_LAST_BLOCKS, own.AVGPOOL_PATCHTOKENS)

    def measure(self, features: SplitFeatures) -> Found:
        """Raises InputError where the folder holds another probe's state."""
        started, own = time.perf_counter(), self.options
        if own.CLASSIFIER == "sgd":
            distributed.on_main(lambda: claim(self.own_folder, "probe"))
        test = self.features_of(features, "test")
        outputs = own.NUM_LABELS or len(test.classes)
        if outputs < len(test.classes):
            raise InputError(
                f"--num_labels {outputs} is less than the {len(test.classes)} classes of the data: "
                f"leave it out to have as many as the data has."
            )
        reading = features.reading
        if self.augmented:
            encoder = features.encoder(own.N_LAST_BLOCKS, own.AVGPOOL_PATCHTOKENS)
            data = AugmentedImages(encoder, features.images("train"), reading, self.seed)
        else:
            data = CachedFeatures(self.features_of(features, "train"), reading.world.device)
        logger.info(f"linear probe, {100 * self.share:g} % of the labels, seed {self.seed}")
        if own.CLASSIFIER == "sgd" and len(own.SWEEP) > 1:
            rates = "  ".join(f"{lr:g}" for lr in own.SWEEP)
            logger.info(f"top-1 below is for the base rates {rates}")
        used = torch.arange(len(data.labels))
        if self.share < 1:
            used = linear.stratified(data.labels, self.share, self.seed)
        figures = {
            "protocol": "linear probe",
            "classifier": own.CLASSIFIER,
            "features": "augmented" if self.augmented else "cached",
            "label_share": self.share,
            "seed": self.seed,
            "test_images": len(test.labels),
            "outputs": outputs,
        }
        if own.CLASSIFIER == "logistic":
            figures |= self._logistic(data, used, test, outputs)
        else:
            figures |= self._sgd(data, used, test, outputs, reading)
        blocks = len(test.widths) - test.avgpool_patchtokens
        if blocks < own.N_LAST_BLOCKS:
            figures["remarks"].append(
                f"features of {blocks} block, not of {own.N_LAST_BLOCKS} (--n_last_blocks): "
                f"EVAL.POOLING {features.pooling} has no more"
            )
        if own.AVGPOOL_PATCHTOKENS and not test.avgpool_patchtokens:
            figures["remarks"].append(
                "no mean of the patches is appended (--avgpool_patchtokens): the features are one, "
                "or a mean by EVAL.POOLING"
            )
        bad = _all_bad(data)
        if bad:
            figures["remarks"].append(f"{len(bad)} unreadable training images are left out")
            listed = {*features.bad.get("train", []), *(str(image) for image in bad)}
            features.bad["train"] = sorted(listed)
        figures["train_images"] = len(used) - len(bad)
        figures["seconds"] = round(time.perf_counter() - started, 1)
        return Found(figures)

    def _held_out(self, labels: Tensor, used: Tensor) -> Tensor:
        """Indices of the used training images on which settings are compared."""
        mask = linear.hold_out(labels[used], self.options.HOLD_OUT, self.seed)
        if not mask.any():
            raise InputError(
                "no training image can be held out to choose by: every class has just one. Give "
                "one learning rate or C."
            )
        return used[mask]

    def _logistic(self, data: CachedFeatures, used: Tensor, test: Features, outputs: int) -> dict:
        """Logistic regression; of several C the best on held-out training images, then all.

        Every process does all of it: one alone could take longer than the others may wait.
        """
        comparison, remarks, (chosen, *others) = [], [], self.options.C
        if others:
            held = self._held_out(data.labels, used)
            kept = used[~torch.isin(used, held)]
            for c in self.options.C:
                values, _ = data.plain(held)
                scores, more = linear.logistic_scores(*data.plain(kept), values, outputs, c)
                remarks += [f"{remark} (on the images to choose by)" for remark in more]
                top1 = linear.top_accuracy(scores, data.labels[held])[0]
                comparison.append({"C": c, "held_out_top1": top1})
            chosen = max(comparison, key=lambda line: line["held_out_top1"])["C"]
        scores, more = linear.logistic_scores(*data.plain(used), test.values, outputs, chosen)
        top1, top5 = linear.top_accuracy(scores, test.labels)
        remarks += more
        return {"C": chosen, "top1": top1, "top5": top5, "sweep": comparison, "remarks": remarks}

    def _sgd(
        self,
        data: AugmentedImages | CachedFeatures,
        used: Tensor,
        test: Features,
        outputs: int,
        reading: Reading,
    ) -> dict:
        """Train the heads, or go on with them, and choose among the learning rates."""
        own, world, batch = self.options, reading.world, reading.batch * reading.world.size
        lrs = tuple(own.SWEEP or [own.BASE_LR])
        recipe = linear.Recipe(lrs, own.EPOCHS, batch, own.VAL_FREQ, outputs, self.seed)
        held_out = torch.zeros(len(data.labels), dtype=torch.bool)
        if recipe.has_twins:
            held_out[self._held_out(data.labels, used)] = True
        probe = linear.Probe(recipe, test.values.shape[1], held_out, world)
        settings = {
            **{name: str(value) for name, value in asdict(recipe).items()},
            **{f"test {name}": value for name, value in test.made_by.items()},
            "blocks": str(len(test.widths)),
            "mean of patches": str(test.avgpool_patchtokens),
            "held out": str(own.HOLD_OUT if recipe.has_twins else 0),
            "training features": type(data).__name__,
            "training images": str(len(used)),
            "training data": data.fingerprint,
        }
        remarks = self._resume(probe, data, settings)
        distributed.agree(
            {"the epoch to go on from": probe.epoch}, "put --output_dir where all of them see it"
        )
        sampler = EpochSampler(used, batch, world, self.seed, probe.epoch, recipe.epochs)
        batches = data.batches(sampler, probe.width)
        while probe.epoch < recipe.epochs:
            loss = probe.train_epoch(batches, sampler.batches_per_epoch).item()
            bad = _all_bad(data)
            check_bad(bad, len(data.labels), reading.max_bad)
            if not math.isfinite(loss) and not recipe.has_twins:
                raise InputError(
                    f"the probe's loss is {loss} at epoch {probe.epoch}: lower its learning rate, "
                    f"--lr."
                )
            if probe.epoch % recipe.val_freq == 0 or probe.epoch == recipe.epochs:
                top1, top5 = probe.accuracy(test.values, test.labels)
                heads = len(recipe.lrs)  # without their twins
                line = {"epoch": probe.epoch, "loss": loss if math.isfinite(loss) else None}
                probe.history.append({**line, "top1": top1[:heads], "top5": top5[:heads]})
                state = {"probe": settings, "bad": [asdict(i) for i in bad], "remarks": remarks}
                state |= probe.state()
                distributed.on_main(lambda state=state: self._save(state))
                shown = "  ".join(f"{score:.2f}" for score in top1[:heads])
                if probe.epoch % -(-recipe.epochs // LINES) == 0 or probe.epoch == recipe.epochs:
                    logger.info(
                        f"epoch {probe.epoch}/{recipe.epochs}  loss {loss:.4f}  top-1 {shown} %"
                    )
        figures = self._chosen(probe, data, held_out)
        return figures | {"remarks": remarks + figures["remarks"]}

    def _save(self, state: dict) -> None:
        checkpoint.save(state, self.own_folder / STATE)
        lines = (f"{json.dumps(line)}\n" for line in state["history"])
        write_text(self.own_folder / LOG, "".join(lines), "log")

    def _resume(
        self, probe: linear.Probe, data: AugmentedImages | CachedFeatures, settings: dict[str, str]
    ) -> list[str]:
        """Go on from the state in the folder, if there is one and it is of this probe; says so."""
        path = self.own_folder / STATE
        if not path.exists():
            return []
        state = checkpoint.load_file(path)
        stored = state.get("probe") if isinstance(state, dict) else None
        if not isinstance(stored, dict):
            raise InputError(f"{path} is not a linear probe: choose another --output_dir.")
        different = [name for name in settings if stored.get(name) != settings[name]]
        if different:
            raise InputError(
                f"{path.parent} holds a probe of other settings ({', '.join(different)} differ): "
                f"choose another --output_dir, or remove {path} to start anew there."
            )
        probe.load_state(state)
        data.bad.update(BadImage(**image) for image in state["bad"])
        logger.info(f"going on with the probe in {path} at epoch {probe.epoch}")
        remarks = state.get("remarks", [])
        if probe.epoch < probe.recipe.epochs:
            remarks.append(f"went on from epoch {probe.epoch} in a second command")
        return remarks

    def _chosen(
        self, probe: linear.Probe, data: AugmentedImages | CachedFeatures, held_out: Tensor
    ) -> dict:
        """The figures of the trained head, of several those of the best twin's."""
        recipe = probe.recipe
        heads = [{"base_lr": lr} for lr in recipe.lrs]
        for index, head in enumerate(heads):
            best = max(probe.history, key=lambda line, i=index: line["top1"][i])
            head |= {
                "top1": probe.history[-1]["top1"][index],
                "top5": probe.history[-1]["top5"][index],
                "best_top1": best["top1"][index],
                "best_epoch": best["epoch"],
            }
        figures = {"epochs": recipe.epochs, "batch": recipe.batch}
        if not recipe.has_twins:
            return {**figures, **heads[0], "sweep": [], "remarks": []}
        values, labels = data.plain(held_out.nonzero().flatten())
        scores = probe.accuracy(values, labels)[0][len(heads) :]
        for head, score in zip(heads, scores, strict=True):
            head["held_out_top1"] = score
        sound = probe.finite()
        usable = [i for i in range(len(heads)) if sound[i] and sound[len(heads) + i]]
        if not usable:
            raise InputError("every learning rate of --sweep made the probe diverge: give lower.")
        chosen = heads[max(usable, key=scores.__getitem__)]
        lost = len(heads) - len(usable)
        remarks = [f"{lost} of {len(heads)} learning rates diverged"] * (lost > 0)
        known = {"held_out_images": len(labels), "sweep": heads, "remarks": remarks}
        return figures | chosen | known


def _all_bad(data: AugmentedImages | CachedFeatures) -> set[BadImage]:
    """The unreadable images that any process has met so far."""
    return set().union(*distributed.gather_objects(data.bad))
