"""What options and data would run with and yet be unwise: warnings, before any work."""

from collections.abc import Iterator

from engine import build
from models.registry import resolve
from utils.config import Node


def warnings(cfg: Node, processes: int, images: int) -> Iterator[str]:
    """A sentence for each thing. images: of the training set."""
    goal, batch = build.objective(cfg), cfg.TRAIN.BATCH_SIZE_PER_GPU
    bags = 2 * (batch * processes - 1)
    if goal.needs_pooling and goal.lt in ("residual", "diverse") and bags <= goal.diverse_k:
        yield (
            f"CMD.LT {goal.lt} compares a patch with {bags} bags of other images, and "
            f"CMD.DIVERSE_K is {goal.diverse_k}: all patches count alike, and L_T teaches an even "
            f"attention. Take a larger batch or a smaller CMD.DIVERSE_K."
        )
    if not goal.projects:
        return
    has_norm = cfg.HEAD.USE_BN or resolve(build.backbone_spec(cfg))["family"] == "resnet"
    if has_norm and batch * processes <= cfg.MOCO.BN_IMAGES:
        yield (
            f"all {batch * processes} images of a micro-batch share BatchNorm's statistics, by "
            f"which queries can know their keys. Take a batch of at least twice MOCO.BN_IMAGES "
            f"({cfg.MOCO.BN_IMAGES}), a smaller MOCO.BN_IMAGES, or more processes."
        )
    if images <= cfg.MOCO.QUEUE:
        yield (
            f"MOCO.QUEUE {cfg.MOCO.QUEUE} holds a key of each of the {images} images: an image's "
            f"own old keys count as others'. Take a shorter queue."
        )
