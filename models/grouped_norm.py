"""BatchNorm over groups of a batch, as if each were the batch of a process of its own."""

from functools import cache

import torch
from torch import Tensor, nn


class GroupedBatchNorm:
    """In training, consecutive groups of at most `images` have statistics of their own.

    As on so many GPUs without synchronisation, which MoCo's shuffling counts on; the running
    statistics follow one group after the other. Groups are as equal as can be. It stands before a
    kind of BatchNorm among the bases of a class.
    """

    images: int = 32

    def forward(self, batch: Tensor) -> Tensor:
        if not self.training or len(batch) <= self.images:
            return super().forward(batch)
        groups = batch.tensor_split(-(-len(batch) // self.images))
        return torch.cat([super(GroupedBatchNorm, self).forward(group) for group in groups])


@cache
def _grouped(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Grouped{kind.__name__}", (GroupedBatchNorm, kind), {})


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Those in `module`, of any kind; timm's come with an activation."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def group_batch_norm(module: nn.Module, images: int) -> None:
    """Make every BatchNorm in `module` a grouped one, in place.

    Parameters, buffers and their names stay.
    """
    for norm in batch_norms(module):
        norm.__class__ = _grouped(type(norm))
        norm.images = images
