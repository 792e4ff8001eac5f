"""TRAIN.DETERMINISTIC: the same command gives the same bits every time, or says why it cannot.

Without it cuDNN may choose its kernels by time.
"""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from utils.config import Node
from utils.errors import InputError
from utils.logging import logger

# cuBLAS: eight buffers of 4 MiB a stream; ":16:8" takes less memory and more time.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")


def set_deterministic(cfg: Node) -> None:
    """Where TRAIN.DETERMINISTIC is on, let torch use only operations that repeat their bits.

    To be called once, before the first product on a GPU: cuBLAS reads its environment variable
    when it starts (it is set unless the user has). Turns on torch.use_deterministic_algorithms.
    Where it is off, cuDNN's benchmark is on: at the first batch of each shape it picks a kernel by
    time, and crops come in two or three sizes for a whole run.

    Covered, on one machine with the same versions, number of processes and options:
    - the CPU: the sums of a given number of threads have one order. There the option changes no
      bit of a run, which repeats without it;
    - a GPU, where torch has a second form of what otherwise sums in the order in which threads
      arrive: index_add (the objective's matches), scatter (of the crops' resizing matrices), the
      gradients of topk, gather and Swin's position biases, convolutions (patch embedding,
      ResNet), attention's gradient. By torch's list; we have not run it on a GPU.
    Not covered:
    - another GPU model, driver, version of torch, CUDA, cuDNN or NCCL, another number of
      processes or batches, another shape: sums are then split differently;
    - sums over processes: NCCL repeats its order for the same processes on the same machines,
      as far as it chooses the same algorithm; NCCL_ALGO=Ring fixes it;
    - what has no second form: torch then refuses, see `explain_refusal`. By torch's list that is
      the gradient of a bicubic resize on a GPU before torch 2.15: a ViT's position embeddings,
      where a crop's size is not MODEL.IMG_SIZE.

    Raises InputError for a value of CUBLAS_WORKSPACE_CONFIG with which cuBLAS does not repeat.
    """
    torch.backends.cudnn.benchmark = not cfg.TRAIN.DETERMINISTIC
    if not cfg.TRAIN.DETERMINISTIC:
        return
    if os.environ.setdefault(_WORKSPACE, _WORKSPACES[0]) not in _WORKSPACES:
        raise InputError(
            f"TRAIN.DETERMINISTIC: with {_WORKSPACE}={os.environ[_WORKSPACE]} in the environment "
            f"cuBLAS does not repeat its sums; unset it, or set it to {' or '.join(_WORKSPACES)}."
        )
    torch.use_deterministic_algorithms(True)
    # Else torch fills every new tensor first: a pass over memory, and nothing here reads one unset.
    torch.utils.deterministic.fill_uninitialized_memory = False
    logger.info(
        "deterministic: the same command on the same machine gives the same bits; on GPUs steps "
        "are slower, and an operation that cannot repeat its bits stops the run"
    )


@contextlib.contextmanager
def explain_refusal() -> Iterator[None]:
    """Turn torch's refusal of an operation that cannot repeat its bits into an InputError.

    To be put around steps; other errors pass. The sentence names the operation.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise InputError(
            f"TRAIN.DETERMINISTIC: the operation {found[1]} cannot repeat its bits on this "
            f"device; set TRAIN.DETERMINISTIC false, or another architecture or crop size."
        ) from None
