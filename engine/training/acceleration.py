"""What makes a step cheaper and leaves what it computes: put around the networks from outside.

Parameters, their names and checkpoints stay as they are.
"""

import functools
import os
import shlex
import shutil
from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.grouped_norm import batch_norms
from models.network import Network
from utils.errors import InputError


def checkpoint_blocks(network: Network) -> None:
    """Recompute each block of the backbone in the backward pass instead of keeping its inside.

    The same numbers, drop path included, for one more forward pass. Raises InputError for a
    backbone with BatchNorm in training mode, whose statistics would count every batch twice.
    """
    if any(norm.training for norm in batch_norms(network.backbone)):
        raise InputError(
            "TRAIN.CHECKPOINTING: this backbone has BatchNorm, whose running statistics would "
            "count every batch twice; leave it off, or start from weights with INIT.BATCH_NORM "
            "statistics. What saves memory is a lower TRAIN.BATCH_SIZE_PER_GPU and a higher "
            "TRAIN.ACCUM_STEPS."
        )
    for block in network.backbone.all_blocks():
        block.forward = functools.partial(_recomputed, block, block.forward)


def _recomputed(
    block: nn.Module, forward: Callable[..., Tensor], *inputs: Tensor, **more: Tensor | None
) -> Tensor:
    """A block's forward; of one that is frozen nothing is kept anyway (freezing.py).

    more: what a model of timm gives its blocks by name, such as rotations of positions.
    """
    if not block.training:
        return forward(*inputs, **more)
    return checkpoint(forward, *inputs, use_reentrant=False, **more)


def compile_network(network: Network, backend: str = "inductor") -> None:
    """torch.compile of backbone and heads: one graph for each crop size, without breaks.

    Compiled at the first step that needs it. Compiled drop path draws other random numbers than
    the plain one, the same ones every time for a (seed, step). Raises InputError where
    there is no compiler to work with.
    """
    if backend == "inductor":
        _check_compiler()
    # Here, for every run would pay seconds for it.
    from torch._dynamo import config

    if network.rationale is not None:
        # GradCAM goes through the head's graph before the backward pass does.
        from torch._functorch import config as functorch

        functorch.donated_buffer = False

    # A graph for each size of crop, of student and teacher.
    config.recompile_limit = max(64, config.recompile_limit)
    for part in (network.backbone, network.head, network.head_dense, network.head_bag):
        if part is not None:
            # Its collectives cannot be traced: the graph breaks there, and only there.
            breaks = any(isinstance(module, nn.SyncBatchNorm) for module in part.modules())
            part.compile(fullgraph=not breaks, dynamic=False, backend=backend)


def _check_compiler() -> None:
    """inductor wants g++ (or $CXX) for a CPU, and triton a C compiler for a GPU."""
    named = [os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc"), "clang"]
    if not any(shutil.which(shlex.split(name)[0]) for name in named if name.strip()):
        raise InputError(
            "TRAIN.COMPILE: torch.compile needs a C++ compiler, and there is no g++ or clang (nor "
            "what the variables CXX and CC name). Install one, or leave TRAIN.COMPILE off."
        )
