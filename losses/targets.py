"""Centring and sharpening: the teacher's side of DINO (Caron et al. 2021).

q = softmax((W e - c) / tau_t), with c an EMA of the batch's mean logits. As logits are linear
in the embeddings, their mean is W times the mean embedding: no logit is built for it.
"""

import torch
from torch import Tensor, nn

from losses.cross_entropy import Targets
from utils import distributed
from utils.views import Views


def image_targets(teacher: Views, centre: Tensor, temperature: float) -> Targets:
    """q^I of the image-level views, crop-major: I * B rows."""
    return Targets(teacher.image_embeddings, teacher.image_prototypes, temperature, centre)


def region_targets(teacher: Views, centre: Tensor, temperature: float) -> Targets:
    """q of all patches of the image-level views, crop-major: I * B * N rows."""
    (patches,) = teacher.patch_embeddings
    return Targets(patches.flatten(0, 1), teacher.region_prototypes, temperature, centre)


class Centres(nn.Module):
    """c_I and c_R: EMA of the teacher logits' mean over batch and processes [esvit].

    One update an optimizer step, after the loss: micro-batches are first collected by
    `collect`, then averaged over processes and applied by `update`, so that gradient
    accumulation sees the centres of the whole batch.
    """

    image: Tensor
    region: Tensor | None

    def __init__(self, prototypes: int, region: bool = True, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        for name, kept in (("image", True), ("region", region)):
            self.register_buffer(name, torch.zeros(prototypes) if kept else None)
        self._collected: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def collect(self, teacher: Views) -> None:
        """Note one micro-batch's mean logits [K] of each kind that is kept."""
        means = {"image": teacher.image_prototypes @ teacher.image_embeddings.mean(0)}
        if self.region is not None:
            (patches,) = teacher.patch_embeddings
            means["region"] = teacher.region_prototypes @ patches.flatten(0, 1).mean(0)
        self._collected.append(means)

    @torch.no_grad()
    def update(self, good: Tensor | None = None) -> Tensor:
        """c <- m c + (1 - m) mean, over what was collected since the last update.

        good: a bool scalar on the device, whether this process's step was (None: it was).
        Returns whether that of every process was, by the same exchange; where one was not, the
        centres stay as they are.
        """
        collected, self._collected = self._collected, []
        if not collected:
            raise RuntimeError("Centres.update was called with nothing collected")
        means = [torch.stack([micro[name] for micro in collected]).mean(0) for name in collected[0]]
        bad = torch.zeros_like(means[0][:1]) if good is None else ~good[None]
        *means, bad = distributed.totals([*means, bad])
        for name, total in zip(collected[0], means, strict=True):
            centre = getattr(self, name)
            moved = self.momentum * centre + (1 - self.momentum) * total / distributed.size()
            centre.copy_(torch.where(bad > 0, centre, moved))
        return bad[0] == 0
