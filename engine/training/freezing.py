"""Continuing from weights: what of both backbones stays as it is, for good or for a while.

Heads are drawn at random, and their first gradients would change a backbone that someone has
trained for reasons that are not yet any. So the heads train alone at first (INIT.HEADS_EPOCHS);
a share of the lower blocks may stay for good (INIT.FROZEN). BatchNorm keeps the statistics that
came with the weights (INIT.BATCH_NORM): those of augmented crops are others, and moving to them
takes more from the features of whole images than a short run gives.
"""

from models.backbone import Backbone
from models.grouped_norm import batch_norms
from models.network import Network
from utils.config import Node


class Freezing:
    """Who trains in an epoch.

    What is frozen takes no gradient: autograd keeps nothing of its forward pass, there is no
    backward pass through it, and the teacher's average leaves it out. In student and teacher it is
    in eval mode: no drop path, and BatchNorm normalises by its statistics, which stay too.

    INIT.FROZEN is a share of `all_blocks()`, rounded; with it goes all that stands before the first
    block that trains (`Backbone.depths`). It is frozen here, at once; `enter` does the rest.
    BatchNorm whose statistics stay is in eval mode, its scale and shift train.
    """

    def __init__(self, cfg: Node, student: Network, teacher: Network) -> None:
        self._backbones = student.backbone, teacher.backbone
        self._heads_epochs, self._heads_alone = cfg.INIT.HEADS_EPOCHS, None
        share, blocks = cfg.INIT.FROZEN, len(student.backbone.all_blocks())
        last, self._fixed = round(share * blocks) if share else -1, []
        for backbone in self._backbones:
            if cfg.INIT.BATCH_NORM == "statistics":
                self._fixed += batch_norms(backbone)
            depths = backbone.depths()
            for module, depth in depths.items():
                if depth <= last:
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(False)
                if all(depths[inner] <= last for inner in module.modules()):
                    self._fixed.append(module)
        self._set_fixed()
        self._upper = [p for p in student.backbone.parameters() if p.requires_grad]

    def enter(self, epoch: int) -> bool:
        """Freeze what `epoch`, from 0, calls for; whether other parameters train than before.

        At the first call they do.
        """
        before, self._heads_alone = self._heads_alone, epoch < self._heads_epochs
        if self._heads_alone == before:
            return False
        for parameter in self._upper:
            parameter.requires_grad_(not self._heads_alone)
        self.set_modes()
        return True

    def set_modes(self) -> None:
        """Training mode for what trains in both backbones, eval mode for what is frozen."""
        for backbone in self._backbones:
            backbone.train(not self._heads_alone)
        self._set_fixed()

    def _set_fixed(self) -> None:
        for module in self._fixed:
            module.training = False


def recipe(cfg: Node, backbone: Backbone) -> str:
    """INIT.* in a line, for people; empty where all of it is off."""
    init, parts, blocks = cfg.INIT, [], len(backbone.all_blocks())
    if init.HEADS_EPOCHS > 0:
        parts.append(f"heads alone for {init.HEADS_EPOCHS} of {cfg.TRAIN.EPOCHS} epochs")
    if init.FROZEN:
        parts.append(f"stem and {round(init.FROZEN * blocks)} of {blocks} blocks frozen")
    if init.LAYER_DECAY not in (0, 1):
        least = init.LAYER_DECAY ** (blocks + 1)
        parts.append(f"learning rate times {init.LAYER_DECAY:g} a block, {least:.2g} at the stem")
    if init.BATCH_NORM == "statistics" and batch_norms(backbone):
        parts.append("BatchNorm by the statistics of the weights")
    return "; ".join(parts)
