"""What makes a step cheaper and leaves what it computes: put around the networks from outside.

Parameters, their names and checkpoints stay as they are.
"""

import functools
import os
import shutil

from torch import nn
from torch.utils.checkpoint import checkpoint

from models.network import Network
from utils.errors import InputError


def checkpoint_blocks(network: Network) -> None:
    """Recompute each block of the backbone in the backward pass instead of keeping its inside.

    The same numbers, drop path included, for about a third more time. Raises InputError for a
    backbone with BatchNorm, whose statistics would count every batch twice.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    if any(isinstance(module, kinds) for module in network.backbone.modules()):
        raise InputError(
            "TRAIN.CHECKPOINTING: this backbone has BatchNorm, whose running statistics would "
            "count every batch twice; leave it off, or lower TRAIN.BATCH_SIZE_PER_GPU and raise "
            "TRAIN.ACCUM_STEPS to save memory."
        )
    for block in network.backbone.all_blocks():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_network(network: Network, backend: str = "inductor") -> None:
    """torch.compile of backbone and heads: one graph for each crop size, without breaks.

    Compiled at the first step that needs it. Compiled drop path draws other random numbers than
    the plain one, the same ones every time for a (seed, step). Raises InputError where
    inductor has no compiler to work with.
    """
    on_gpu = next(network.parameters()).is_cuda
    if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")) and not on_gpu:
        raise InputError(
            "TRAIN.COMPILE: on a CPU torch.compile needs a C++ compiler, and there is no g++ "
            "(nor what the variable CXX names). Install one, or leave TRAIN.COMPILE off."
        )
    for part in (network.backbone, network.head, network.head_dense):
        if part is not None:
            part.compile(fullgraph=True, dynamic=False, backend=backend)
