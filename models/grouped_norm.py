"""BatchNorm over groups of a batch, as if each were the batch of a process of its own."""

import torch
from torch import Tensor, nn


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """In training, consecutive groups of `images` have statistics of their own.

    As on so many GPUs without synchronisation, which MoCo's shuffling counts on; the running
    statistics follow one group after the other. The last group may be smaller, but not one image.
    """

    images: int = 32

    def forward(self, batch: Tensor) -> Tensor:
        if not self.training or len(batch) <= self.images:
            return super().forward(batch)
        groups = -(-len(batch) // self.images)
        # chunk makes the groups as equal as can be
        return torch.cat([super(GroupedBatchNorm2d, self).forward(g) for g in batch.chunk(groups)])


def group_batch_norm(module: nn.Module, images: int) -> bool:
    """Make every BatchNorm2d in `module` a grouped one, in place; whether there was any.

    Parameters, buffers and their names stay.
    """
    found = [part for part in module.modules() if type(part) is nn.BatchNorm2d]
    for norm in found:
        norm.__class__ = GroupedBatchNorm2d
        norm.images = images
    return bool(found)
