"""Where figures come from: a whole network, and a record of whose weights it has."""

import os
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from engine import build
from engine.evaluation import attention
from models import registry
from models.hub import located, named
from models.network import Network, Parts
from models.pretrained import WeightsFile, load_strictly
from models.recognition import stored_spec
from models.registry import ARCHITECTURES, BackboneSpec, build_backbone, resolve
from models.timm_backbone import PREFIX
from utils import checkpoint, config, seeding
from utils.config import Node
from utils.errors import InputError
from utils.logging import logger
from utils.normalisation import Normalisation
from utils.options import CONTRASTIVE
from utils.seeding import derive_seed

RANDOM = "random initialisation"
NO_KEY = "none"  # of a file that holds one network alone


@dataclass(frozen=True)
class Weights:
    """Where a network's weights come from; written beside every figure.

    sha256: of the file, or the seed of a random initialisation. epoch: epochs it was trained
    for, where known. run_config: the options of the run that made it, if it is ours; of a random
    initialisation, those of the network that it is the zero of. image_size: pixels, where the
    file says them beside its weights (see export.py); else 0. doubts: what is taken of the
    architecture without a word of the file, a sentence each.
    """

    path: str
    sha256: str
    key: str
    arch: str
    backbone: dict
    epoch: int | None = None
    run_config: dict | None = None
    image_size: int = 0
    doubts: tuple[str, ...] = ()

    @property
    def is_random(self) -> bool:
        return self.path == RANDOM


@dataclass(frozen=True)
class Source:
    """A frozen network, in eval mode, and where its weights come from.

    A file that is not a checkpoint of ours gives a network without heads. weights: None for a
    network in memory, whose features cannot be kept.
    """

    weights: Weights | None
    network: Network

    def poolings(self) -> list[str]:
        """The values of EVAL.POOLING that this network can do."""
        attended = [kind for kind in attention.kinds(self.network) if kind in ("mil", "lcr")]
        return ["default", "mean", *attended]

    @property
    def normalisation(self) -> Normalisation:
        """Of the images that the network was trained with."""
        return self.network.backbone.normalisation

    def shape(self, pooling: str) -> dict[str, str]:
        """All but the weights that decides the features of this pooling."""
        network = self.network
        shape = {
            "backbone": repr(registry.identity(BackboneSpec.from_dict(self.weights.backbone))),
            "pooling": pooling,
        }
        if pooling == "mil" and network.parts.heads is not None:
            # Prototypes have no part in a feature.
            shape["heads"] = repr(replace(network.parts.heads, out_dim=0))
        if pooling == "lcr" and network.rationale is not None:
            shape["channels"] = str(network.rationale.channels)
        return shape

    def identity(self, pooling: str) -> dict[str, str]:
        """All of the network that decides its features, to compare kept features by."""
        return {
            "weights": self.weights.sha256,
            "checkpoint_key": self.weights.key,
            **self.shape(pooling),
        }


def load_source(
    path: str | Path,
    key: str = "teacher",
    cfg: Node | None = None,
    typed: Collection[str] = (),
) -> Source:
    """The network at `path`; key: "teacher", "student", or another name in the file.

    Its architecture is what the checkpoint records or its shapes show, but for the MODEL.*
    options of `cfg` that are in `typed`. timm/NAME for a path is what timm has for that name.
    A line says what is doubtful. Raises InputError for what cannot be read or does not fit.
    """
    given, wanted = str(path), None
    if name := named(given):
        wanted = BackboneSpec(PREFIX + name, img_size=cfg.MODEL.IMG_SIZE if cfg else 224)
    elif "MODEL.ARCH" in typed and cfg.MODEL.ARCH.startswith(PREFIX):
        wanted = build.backbone_spec(cfg)
    path = checkpoint.weights_file(located(given))
    written = os.path.exists(path) and os.path.getmtime(path)
    file = WeightsFile.read(path, key, wanted)
    for line in file.lines():
        logger.info(line)
    spec = _chosen_spec(file.spec, cfg, typed) if typed else file.spec
    own = file.contents if checkpoint.is_own(file.contents) else {}
    pixels = file.metadata.get("image_size", "")  # anything, in someone else's file
    doubts = {k: doubt for k, doubt in file.doubts.items() if f"MODEL.{k.upper()}" not in typed}
    if "MODEL.ARCH" in typed and spec.num_heads == ARCHITECTURES.get(spec.arch, {}).get(
        "num_heads"
    ):
        doubts.pop("num_heads", None)
    for name, doubt in doubts.items():
        is_option = name in ("num_heads", "img_size")
        advice = f"; MODEL.{name.upper()} of the evaluation scripts says otherwise" * is_option
        logger.warning(f"{path}: {doubt}{advice}")
    weights = Weights(
        path=given,
        sha256=checkpoint.sha256(path),
        key=file.key if file.key in file.contents else NO_KEY,
        arch=spec.arch,
        backbone=spec.to_dict(),
        epoch=own.get("epoch"),
        run_config=own.get("config"),
        image_size=int(pixels) if pixels.isdecimal() else 0,
        doubts=tuple(doubts.values()),
    )
    if os.path.getmtime(path) != written:
        raise InputError(f"{path} has changed while it was read: is a run writing it? Try again.")
    objective = config.from_dict(own["config"], str(path)).LOSS.OBJECTIVE if own else ""
    if objective in CONTRASTIVE and file.key == "teacher":
        logger.info(
            f"{path}: this is the teacher, the key encoder; MoCo and LCR evaluate the query "
            f"encoder (--checkpoint_key student)"
        )
    if own and registry.identity(spec) == registry.identity(stored_spec(own, {})):
        network = _network(**own["model"])
        # The student's branch is in the teacher's state too.
        load_strictly(network, own[file.key], f"{path} ({file.key})")
        network.backbone.normalisation = file.normalisation
        return Source(weights, network.eval().requires_grad_(False))
    try:
        return Source(weights, Network(replace(file, spec=spec).backbone(), Parts()).eval())
    except InputError as error:
        if spec == file.spec:
            raise
        raise InputError(
            f"{error} By itself the file shows {file.spec.arch}: without --arch and MODEL.* "
            f"options that is taken."
        ) from None


def _network(backbone: dict, **parts: Any) -> Network:
    """By what a checkpoint of ours says of its networks; see build.model_description."""
    return Network(build_backbone(BackboneSpec.from_dict(backbone)), Parts.from_dict(**parts))


def random_like(source: Source, seed: int) -> Source:
    """A freshly initialised network of the same shape, from a seed: the zero of every figure."""
    return _random(source.network.parts, source.weights, seed, source.normalisation)


def random_from_options(cfg: Node, seed: int) -> Source:
    """A freshly initialised network of the shape that a run of these options has."""
    backbone, options = build.backbone_spec(cfg).to_dict(), config.to_dict(cfg)
    weights = Weights(RANDOM, "", NO_KEY, cfg.MODEL.ARCH, backbone, run_config=options)
    return _random(build.parts(cfg), weights, seed, config.normalisation(cfg))


def _random(parts: Parts, weights: Weights, seed: int, by: Normalisation) -> Source:
    """A network whose backbone a run with SEED `seed` would begin with, and fresh other parts."""
    if parts.heads:
        # Prototypes have no part in a feature: the fewest. What is drawn after them is another
        # draw than the run's.
        parts = replace(parts, heads=replace(parts.heads, out_dim=2))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, seeding.INITIALISATION))
        network = Network(build_backbone(BackboneSpec.from_dict(weights.backbone)), parts)
    network.backbone.normalisation = by
    weights = replace(weights, path=RANDOM, sha256=f"seed {seed}", key=NO_KEY, epoch=0)
    return Source(weights, network.eval().requires_grad_(False))


def _chosen_spec(known: BackboneSpec, cfg: Node, typed: Collection[str]) -> BackboneSpec:
    """What the checkpoint says, with the user's MODEL.* options laid over it."""
    wanted = build.backbone_spec(cfg)
    spec = known
    if "MODEL.ARCH" in typed and wanted.arch != known.arch:
        # Another architecture: its own figures, not the checkpoint's. But heads are known better
        # there: a Swin's by their shapes, and a ViT's are not by its name (MoCo v3's vit_small).
        same_family = resolve(wanted)["family"] == resolve(known)["family"]
        spec = replace(known, embed_dim=0, depths=()) if same_family else wanted
    names = [field.name for field in fields(wanted) if f"MODEL.{field.name.upper()}" in typed]
    return replace(spec, **{name: getattr(wanted, name) for name in names})


def image_size(source: Source, size: int = 0) -> int:
    """Pixels of the centre crop: EVAL.SIZE (`size`), else as in the source's own run, else 224.

    A run of ours has its own EVAL.SIZE or, by default, its global crops; an export of ours says
    that too. Raises InputError where the backbone cannot take it.
    """
    weights = source.weights
    size = size or weights.image_size
    if not size and weights.run_config is not None:
        size = config.eval_size(config.from_dict(weights.run_config, weights.path))
    size = size or 224
    if misfit := source.network.backbone.misfit(size):
        raise InputError(f"EVAL.SIZE {size} {misfit} {weights.arch}.")
    return size
