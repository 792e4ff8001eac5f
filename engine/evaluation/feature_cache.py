"""Features of two splits: extracted once, used by every protocol, refused where they do not fit.

A file of them is safetensors: the features, their labels, the images' paths, and in its metadata
what made them (the checkpoint's sha256 among it), so that no figure comes from stale features.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from datasets.folder import CONTENTS, LabelledImages
from datasets.splits import Splits
from datasets.strings import Strings
from datasets.synthetic_images import COARSE_NAMES
from engine.evaluation.features import Encoder, Reading, check_bad
from engine.evaluation.source import Source
from utils import distributed
from utils.checkpoint import save_safetensors
from utils.errors import InputError
from utils.files import make_folder
from utils.logging import logger
from utils.normalisation import IMAGENET

FORMAT = "1"
# Fields of Features in a file's tensors (the header of a safetensors file is too small for a
# million paths) and in its metadata.
_TEXTS = ("paths", "classes", "bad")
_DATA = ("root", "widths", "avgpool_patchtokens", "made_by")
SPLITS = ("train", "test")
BAD_SHOWN = 5
ROWS_AT_ONCE = 8192  # of features


@dataclass(frozen=True)
class Features:
    """Features of one split.

    values: float32 [n, D], the parts of an Encoder side by side, of `widths` columns each; the
    last part is the patches' mean where `avgpool_patchtokens`. labels int64 [n] index
    `classes`. paths: relative to `root`. bad: images that were left out, one line each.
    made_by: what decides the values, by name.
    """

    values: Tensor
    labels: Tensor
    paths: Sequence[str]
    classes: list[str]
    root: str
    widths: list[int]
    avgpool_patchtokens: bool
    bad: list[str]
    made_by: dict[str, str]

    @property
    def are_alike(self) -> bool:
        """Whether several images have the same features, but for rounding."""
        if len(self.values) < 2:
            return False
        most, least = self.values.amax(0), self.values.amin(0)
        return bool((most - least).max() <= 1e-6 * most.maximum(-least).max())

    def narrowed(self, blocks: int, avgpool_patchtokens: bool = False) -> "Features":
        """These features with the columns of the last `blocks` blocks alone (a view).

        And of the patches' mean, if asked for. With one block and without it, they are the
        image feature.
        """
        end = len(self.widths) - (self.avgpool_patchtokens and not avgpool_patchtokens)
        start = end - blocks - avgpool_patchtokens
        columns = slice(sum(self.widths[:start]), sum(self.widths[:end]))
        return replace(
            self,
            values=self.values[:, columns],
            widths=self.widths[start:end],
            avgpool_patchtokens=avgpool_patchtokens,
        )

    def misfit(self, made_by: dict[str, str], blocks: int, avgpool_patchtokens: bool) -> str:
        """Why these features cannot stand for those wanted; empty where they can."""
        for name, wanted in made_by.items():
            held = self.made_by.get(name, "unknown")
            if held == wanted:
                continue
            if name == "weights":
                return f"they come from another checkpoint (sha256 {held[:12]}, not {wanted[:12]})"
            if name == "images":
                if not held.startswith(CONTENTS):
                    return "an earlier version kept them, which did not look at images' contents"
                return "the images have changed since: their names, contents, number or labels"
            return f"their {name} is {held}, not {wanted}"
        if avgpool_patchtokens and not self.avgpool_patchtokens:
            return "they lack the mean of the patches"
        held_blocks = len(self.widths) - self.avgpool_patchtokens
        if blocks > held_blocks:
            return (
                f"they hold the last {held_blocks} blocks, not {blocks} (--n_last_blocks "
                f"{held_blocks} takes these)"
            )
        return ""


def coarse_labels(labels: Tensor, classes: list[str]) -> Tensor:
    """Fine labels [n] -> the places in COARSE_NAMES of what their names begin with, to "_"."""
    places = [COARSE_NAMES.index(name.split("_", 1)[0]) for name in classes]
    return torch.tensor(places)[labels]


@dataclass
class SplitFeatures:
    """The features of a frozen network on two splits.

    source, splits: None where only kept features are at hand. folder: where features are kept,
    None for nowhere; must_fit: they are to be used and nothing else. bad: the unreadable images
    that were left out, by split. coarse: with the synthetic set's coarse classes for labels.
    Raises InputError for a pooling that the network lacks.
    """

    source: Source | None
    splits: Splits | None
    reading: Reading
    pooling: str = "default"
    folder: Path | None = None
    must_fit: bool = False
    coarse: bool = False
    bad: dict[str, list[str]] = field(default_factory=dict)
    held: dict[str, Features] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source is not None:
            self.source.network.to(self.reading.world.device)
            self.encoder()

    def encoder(self, blocks: int = 1, avgpool_patchtokens: bool = False) -> Encoder:
        """The network with the pooling; InputError where no checkpoint was given."""
        if self.source is None:
            raise InputError("no network: give --pretrained_weights.")
        return Encoder(self.source, self.pooling, blocks, avgpool_patchtokens)

    def images(self, split: str) -> LabelledImages:
        """The images of `train` or `test`; InputError where no data was given."""
        if self.splits is None:
            raise InputError("no images: give --data_path (and --dataset).")
        return self.splits.train if split == "train" else self.splits.test

    def of(self, split: str, blocks: int = 1, avgpool_patchtokens: bool = False) -> Features:
        """Features of `train` or `test`: held in memory, else kept on the disk, else extracted.

        The same on every process. blocks, avgpool_patchtokens: as in Encoder, which ignores
        them where the pooling or the family leaves no choice. Raises InputError where kept
        features must fit and do not.
        """
        if self.source is not None:
            encoder = self.encoder(blocks, avgpool_patchtokens)
            blocks, avgpool_patchtokens = encoder.blocks, encoder.avgpool_patchtokens
        elif self.pooling != "default":
            blocks, avgpool_patchtokens = 1, False
        made_by = self._made_by(split)
        held = self.held.get(split)
        if held is None or held.misfit(made_by, blocks, avgpool_patchtokens):
            held = self._read(split, made_by, blocks, avgpool_patchtokens)
            if held is None:
                held = self._make(split, made_by, blocks, avgpool_patchtokens)
            self._check(split, held)
            self.held[split] = held
            if held.bad:
                self.bad[split] = held.bad
                logger.warning(
                    f"left out of the {split} split, unreadable: {len(held.bad)} of "
                    f"{len(held.bad) + len(held.labels)} images: "
                    + "; ".join(held.bad[:BAD_SHOWN])
                    + ("; ..." if len(held.bad) > BAD_SHOWN else "")
                )
        found = held.narrowed(blocks, avgpool_patchtokens)
        if self.coarse:
            labels = coarse_labels(found.labels, found.classes)
            found = replace(found, labels=labels, classes=[*COARSE_NAMES])
        return found

    def images_with_features(self) -> LabelledImages:
        """The images whose features there are: those of `train`, then those of `test`."""
        both = [self.of(split) for split in SPLITS]
        paths = [os.path.join(held.root, path) for held in both for path in held.paths]
        labels = torch.cat([held.labels for held in both])
        return LabelledImages("", paths, labels, both[0].classes)

    def _made_by(self, split: str) -> dict[str, str]:
        """What is known of what decides a split's features."""
        known = {}
        if self.source is not None:
            if self.source.weights is None:
                return known  # what cannot be kept needs no name, and no image is read for it
            known = self.source.identity(self.pooling) | {
                "size": str(self.reading.size),
                "resize": str(self.reading.resize),
                "precision": self.reading.precision,
            }
            if self.reading.normalisation != IMAGENET:
                known["normalisation"] = str(self.reading.normalisation)
        if self.splits is not None:
            known["images"] = self.images(split).fingerprint
        return known

    def _check(self, split: str, features: Features) -> None:
        """Raise InputError for features that no figure should come from."""
        images = len(features.bad) + len(features.labels)
        check_bad(features.bad, images, self.reading.max_bad)
        finite = [part.isfinite().all(dim=1) for part in features.values.split(ROWS_AT_ONCE)]
        broken = (~torch.cat(finite)).nonzero().flatten().tolist()
        if broken:
            coarse = self.reading.precision != "fp32"
            raise InputError(
                f"the features of {len(broken)} of {images} images of the {split} split hold "
                f"infinite or undefined values (the first: {features.paths[broken[0]]}): the "
                f"network has diverged{', or take EVAL.PRECISION fp32' if coarse else ''}."
            )
        if features.are_alike:
            logger.warning(
                f"the features of all images of the {split} split are alike: the network tells "
                f"none from another, and figures are those of guessing"
            )
        for other, held in self.held.items():
            names = (held.made_by.keys() | features.made_by.keys()) - {"images"}
            different = [n for n in sorted(names) if held.made_by.get(n) != features.made_by.get(n)]
            if held.classes != features.classes:
                different.append("classes")
            if different:
                raise InputError(
                    f"the features in {self.folder} do not belong together: {other} and {split} "
                    f"differ in {', '.join(different)}. Extract both splits again."
                )

    def _path(self, split: str) -> Path:
        suffix = "" if self.pooling == "default" else f"-{self.pooling}"
        return self.folder / f"{split}{suffix}.safetensors"

    def _read(
        self, split: str, made_by: dict[str, str], blocks: int, avgpool: bool
    ) -> Features | None:
        """Kept features if they fit on every process, else None."""
        if self.folder is None:
            return None
        path, found, reason = self._path(split), None, ""
        if path.exists() or self.must_fit:
            try:
                found = load(path)
                reason = found.misfit(made_by, blocks, avgpool)
            except InputError as error:
                if self.must_fit and not path.exists():
                    raise
                reason = str(error)
        if reason and self.must_fit:
            raise InputError(f"the features in {path} are refused: {reason}")
        if reason:
            logger.info(f"the features in {path} are made again: {reason}")
            found = None
        if not all(distributed.gather_objects(found is not None)):
            return None
        logger.info(f"features of the {split} split: from {path}")
        if self.splits is not None:
            # The same files, but perhaps under another root than when they were read.
            found = replace(found, root=str(self.images(split).root))
        return found

    def _make(self, split: str, made_by: dict[str, str], blocks: int, avgpool: bool) -> Features:
        encoder, images = self.encoder(blocks, avgpool), self.images(split)
        widths = encoder.widths(self.reading.size)
        if self.source.weights is not None:
            logger.info(f"extracting features of {len(images)} images, the {split} split")
        extracted = self.reading.extract(encoder, images)
        features = Features(
            values=extracted.values,
            labels=extracted.labels,
            paths=images.subset(extracted.places).paths,
            classes=images.classes,
            root=str(images.root),
            widths=widths,
            avgpool_patchtokens=encoder.avgpool_patchtokens,
            bad=[str(bad) for bad in extracted.bad],
            made_by=made_by,
        )
        if self.folder is not None:
            distributed.on_main(lambda: save(features, self._path(split)))
        return features


@dataclass(frozen=True)
class Found:
    """What a protocol finds on the features of both splits: figures are percent, plain data."""

    figures: dict


def save(features: Features, path: Path) -> None:
    """Write the file whole; raises InputError where the disk refuses."""
    tensors = {"values": features.values.contiguous(), "labels": features.labels}
    tensors |= {name: Strings.of(getattr(features, name)).packed for name in _TEXTS}
    metadata = {name: json.dumps(getattr(features, name)) for name in _DATA}
    make_folder(path.parent, "--dump_features")
    save_safetensors(tensors, metadata | {"format": FORMAT}, path, "feature file")


def load(path: Path) -> Features:
    """Read a file; raises InputError where there is none, or it is not a whole one of ours."""
    if not path.is_file():
        kept = ", ".join(sorted(file.name for file in path.parent.glob("*.safetensors")))
        raise InputError(f"there are no features at {path}: its folder holds {kept or 'none'}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or "made_by" not in metadata:
                raise InputError(f"{path} holds no features that this version wrote.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        paths, classes, bad = (Strings(tensors[name]) for name in _TEXTS)
        data = {name: json.loads(metadata[name]) for name in _DATA}
        values, labels = tensors["values"], tensors["labels"]
        return Features(values, labels, paths, classes=[*classes], bad=[*bad], **data)
    except (SafetensorError, OSError, KeyError, ValueError):
        raise InputError(f"{path} is not a feature file, or is damaged.") from None
