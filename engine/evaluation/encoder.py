"""The frozen network under evaluation: someone's weights -> one feature an image."""

import os
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from engine import build
from models import registry
from models.backbone import Backbone
from models.heads import DINOHead
from models.mil import GatedAttentionPool
from models.network import HeadSpec, Network
from models.pretrained import WeightsFile
from models.rationale import RationaleBranch, rationale_weights
from models.registry import ARCHITECTURES, BackboneSpec, build_backbone, resolve
from utils import checkpoint, config, seeding
from utils.config import Node
from utils.errors import InputError
from utils.logging import logger
from utils.options import CONTRASTIVE
from utils.seeding import derive_seed

RANDOM = "random initialisation"
NO_KEY = "none"  # of a file that holds one network alone
# MODEL.* options that a user may type over what a checkpoint says, and the spec's names.
_SPEC_OPTIONS = {
    "MODEL.EMBED_DIM": "embed_dim",
    "MODEL.DEPTHS": "depths",
    "MODEL.NUM_HEADS": "num_heads",
    "MODEL.WINDOW_SIZE": "window_size",
    "MODEL.PATCH_SIZE": "patch_size",
    "MODEL.IMG_SIZE": "img_size",
}


@dataclass(frozen=True)
class Weights:
    """Where a network's weights come from; written beside every figure.

    sha256: of the file, or the seed of a random initialisation. epoch: epochs it was trained
    for, where known. run_config: the options of the run that made it, if it is ours; of a random
    initialisation, those of the network that it is the zero of. image_size: pixels, where the
    file says them beside its weights (see export.py); else 0.
    """

    path: str
    sha256: str
    key: str
    arch: str
    backbone: dict
    epoch: int | None = None
    run_config: dict | None = None
    image_size: int = 0


class Encoder(nn.Module):
    """Images [B, 3, S, S] -> features [B, D], float32, by a frozen network in eval mode.

    pooling: `default`, the features of the last `blocks` blocks concatenated (EsViT's linear
    probe; with one block, the image feature); `mean`, the average of the last stage's normed
    patch features; `mil`, the same weighted by the MIL attention, and `lcr`, by LCR's predicted
    map, so that the three differ in the weights alone (method.md). They always take one block.
    avgpool_patchtokens: see Backbone.last_blocks.
    """

    def __init__(
        self,
        weights: Weights,
        backbone: Backbone,
        region_head: DINOHead | None = None,
        pool: GatedAttentionPool | None = None,
        rationale: RationaleBranch | None = None,
        pooling: str = "default",
        blocks: int = 1,
        avgpool_patchtokens: bool = False,
    ) -> None:
        super().__init__()
        if pooling == "mil" and pool is None:
            raise InputError(
                f"EVAL.POOLING mil needs the region head and the MIL pooling, which only runs of "
                f"the objective cmd of this project have; {weights.path} has none. Use default or "
                f"mean."
            )
        if pooling == "lcr" and rationale is None:
            raise InputError(
                f"EVAL.POOLING lcr needs LCR's branch, which only runs of the objective lcr of "
                f"this project have; {weights.path} has none. Use default or mean."
            )
        self.weights, self.pooling = weights, pooling
        self.blocks = blocks if pooling == "default" else 1
        # The other families' features are such averages already.
        is_vit = ARCHITECTURES[weights.arch]["family"] == "vit"
        self.avgpool_patchtokens = avgpool_patchtokens and pooling == "default" and is_vit
        self.backbone = backbone
        is_mil = pooling == "mil"
        self.region_head, self.pool = (region_head, pool) if is_mil else (None, None)
        self.rationale = rationale if pooling == "lcr" else None
        self.eval().requires_grad_(False)

    def parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """The features before they are concatenated, one [B, D_i] for each block."""
        if self.pooling == "default":
            try:
                return self.backbone.last_blocks(images, self.blocks, self.avgpool_patchtokens)
            except ValueError as error:
                raise InputError(
                    f"LINEAR.N_LAST_BLOCKS (--n_last_blocks) or EVAL.SIZE: {error}."
                ) from None
        patches = self.backbone(images)[1]
        if self.pooling == "mean":
            return (patches.float().mean(dim=1),)
        if self.pooling == "mil":
            attention = self.pool(self.region_head(patches)).exp()
        else:
            attention = rationale_weights(self.rationale(patches))
        return ((attention[..., None] * patches.float()).sum(dim=1),)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([part.float() for part in self.parts(images)], dim=1)

    @torch.no_grad()
    def widths(self, size: int) -> list[int]:
        """D_i of each part, for images of `size` pixels; raises InputError if they cannot be."""
        device = next(self.backbone.parameters()).device
        return [part.shape[1] for part in self.parts(torch.zeros(1, 3, size, size, device=device))]


@dataclass(frozen=True)
class Source:
    """A network's parts and where they come from, before a pooling is chosen."""

    weights: Weights
    backbone: Backbone
    region_head: DINOHead | None = None
    pool: GatedAttentionPool | None = None
    heads: HeadSpec | None = None
    rationale: RationaleBranch | None = None

    def shape(self, pooling: str) -> dict[str, str]:
        """All but the weights that decides the features of this pooling."""
        shape = {
            "backbone": repr(registry.identity(BackboneSpec.from_dict(self.weights.backbone))),
            "pooling": pooling,
        }
        if pooling == "mil" and self.heads is not None:
            # Prototypes have no part in a feature.
            shape["heads"] = repr(replace(self.heads, out_dim=0))
        if pooling == "lcr" and self.rationale is not None:
            shape["channels"] = str(self.rationale.channels)
        return shape

    def identity(self, pooling: str) -> dict[str, str]:
        """All of the network that decides its features, to compare kept features by."""
        return {
            "weights": self.weights.sha256,
            "checkpoint_key": self.weights.key,
            **self.shape(pooling),
        }

    def encoder(self, cfg: Node, blocks: int = 1, avgpool_patchtokens: bool = False) -> Encoder:
        """The encoder that EVAL.POOLING asks for; the rest as in Encoder."""
        return Encoder(
            self.weights,
            self.backbone,
            self.region_head,
            self.pool,
            self.rationale,
            cfg.EVAL.POOLING,
            blocks,
            avgpool_patchtokens,
        )


def load(path: str, cfg: Node, typed: set[str]) -> Source:
    """The network at `path`, by INIT.CHECKPOINT_KEY.

    Its architecture is what the checkpoint records or its shapes show, but for the MODEL.*
    options in `typed`. Raises InputError for what cannot be read or does not fit.
    """
    stamp = _stamp(path)
    file = WeightsFile.read(path, cfg.INIT.CHECKPOINT_KEY)
    spec = _chosen_spec(file.spec, cfg, typed)
    own = file.contents if checkpoint.is_own(file.contents) else {}
    weights = Weights(
        path=str(path),
        sha256=checkpoint.sha256(path),
        key=file.key if file.key in file.contents else NO_KEY,
        arch=spec.arch,
        backbone=spec.to_dict(),
        epoch=own.get("epoch"),
        run_config=own.get("config"),
        image_size=int(file.metadata.get("image_size", 0)),
    )
    if _stamp(path) != stamp:
        raise InputError(f"{path} has changed while it was read: is a run writing it? Try again.")
    objective = config.from_dict(own["config"], str(path)).LOSS.OBJECTIVE if own else ""
    if objective in CONTRASTIVE and file.key == "teacher":
        logger.info(
            f"{path}: this is the teacher, the key encoder; MoCo and LCR evaluate the query "
            f"encoder (--checkpoint_key student)"
        )
    if own and registry.identity(spec) == registry.identity(file.spec):
        network = build.stored_network(own, file.key, path)
        heads = HeadSpec(**own["model"]["heads"])
        return Source(weights, *_parts(network), heads, network.rationale)
    try:
        return Source(weights, replace(file, spec=spec).backbone())
    except InputError as error:
        if spec == file.spec:
            raise
        raise InputError(
            f"{error} By itself the file shows {file.spec.arch}: without --arch and MODEL.* "
            f"options that is taken."
        ) from None


def _stamp(path: str) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def random_like(source: Source, cfg: Node) -> Source:
    """A freshly initialised network of the same shape, from SEED: the zero of every figure."""
    spec = BackboneSpec.from_dict(source.weights.backbone)
    weights = replace(source.weights, path=RANDOM, sha256=f"seed {cfg.SEED}", key=NO_KEY, epoch=0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(cfg.SEED, seeding.INITIALISATION))
        backbone = build_backbone(spec)
        if source.heads is None:
            return Source(weights, backbone)
        # Prototypes have no part in a feature.
        heads = replace(source.heads, out_dim=2)
        channels = source.rationale.channels if source.rationale is not None else 0
        attends = source.pool is not None
        network = Network(backbone, heads, attends, attends, channels)
    return Source(weights, *_parts(network), source.heads, network.rationale)


def _parts(network: Network) -> tuple[Backbone, DINOHead | None, GatedAttentionPool | None]:
    return network.backbone, network.head_dense, network.pool


def _chosen_spec(known: BackboneSpec, cfg: Node, typed: set[str]) -> BackboneSpec:
    """What the checkpoint says, with the user's MODEL.* options laid over it."""
    wanted = build.backbone_spec(cfg)
    spec = known
    if "MODEL.ARCH" in typed and wanted.arch != known.arch:
        # Another architecture: its own figures, not the checkpoint's.
        resolve(wanted)
        same_family = ARCHITECTURES[wanted.arch]["family"] == ARCHITECTURES[known.arch]["family"]
        spec = replace(known, embed_dim=0, depths=(), num_heads=()) if same_family else wanted
        spec = replace(spec, arch=wanted.arch)
    overrides = {name: asdict(wanted)[name] for key, name in _SPEC_OPTIONS.items() if key in typed}
    return replace(spec, **overrides)


def image_size(source: Source, cfg: Node) -> int:
    """Pixels of the centre crop: EVAL.SIZE, else as in the source's own run, else 224.

    A run of ours has its own EVAL.SIZE or, by default, its global crops; an export of ours says
    that too. Raises InputError where the backbone cannot take it.
    """
    size = cfg.EVAL.SIZE or source.weights.image_size
    if not size and source.weights.run_config is not None:
        size = build.eval_size(config.from_dict(source.weights.run_config, source.weights.path))
    size = size or 224
    if size % source.backbone.patch_size:
        raise InputError(
            f"EVAL.SIZE {size} is not a multiple of {source.backbone.patch_size} pixels, the patch "
            f"size of {source.weights.arch}."
        )
    return size
