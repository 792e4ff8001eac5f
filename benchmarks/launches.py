r"""Kernels that a GPU is given in one training step, counted by part; no GPU is needed.

    python -m benchmarks.launches --objective cmd --arch swin_tiny --contestant bf16

The step runs on fake CUDA tensors, which have shapes and no memory. An operator counts as one
kernel and a view as none; torch's calls for many tensors at once count what their kernels can take,
or one for each tensor where they would not take the fused path. Operators that are several kernels
inside (a convolution's gradient, a sort) are counted low, and collectives are not counted.
"""

import contextlib
import inspect
import itertools
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common
from benchmarks.own_step import options
from datasets.loader import Batch
from engine import build
from engine.training import health
from engine.training.guard import RunningStatistics, StepGuard
from engine.training.optim import Clipping, TeacherEMA, step_if
from engine.training.step import Pretraining
from losses.objective import Contrastive, Objective
from losses.targets import Centres
from models.network import Network
from utils.config import Node
from utils.distributed import World
from utils.errors import InputError, run_script

GPU = torch.device("cuda", 0)
# The most tensors and blocks of a multi-tensor kernel, by the number of its lists of tensors: what
# fits in a kernel's arguments, 32 KiB from CUDA 13 on and 4 KiB before.
LARGE_ARGUMENTS = int((torch.version.cuda or "13").partition(".")[0]) >= 13
MOST_TENSORS = (770, 448, 336, 252, 210) if LARGE_ARGUMENTS else (110, 64, 48, 36, 30)
MOST_BLOCKS = 2240 if LARGE_ARGUMENTS else 320
BLOCK = 65536  # elements
CAT_INPUTS = 128  # tensors that one kernel joins, half as many where one is not contiguous
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "device"}
NO_KERNEL |= {"_unsafe_view", "lift_fresh", "_record_function_enter_new", "_record_function_exit"}


def main() -> None:
    parser = common.parser(__doc__)
    common.add_network_options(parser)
    common.add_contestant_option(parser)
    common.add_crop_options(parser, batch=64)
    parser.set_defaults(contestant="bf16")
    args = parser.parse_args()
    began = time.perf_counter()
    figures = count(common.settings_of(args, args.contestant))
    for part, found in figures.items():
        most = ", ".join(
            f"{name} {number}" for name, number in list(found["operators"].items())[:6]
        )
        print(f"{part:20} {found['launches']:6d}   {most}")
    report = {
        "what": f"kernels of a step, {args.contestant}, {common.network_in_words(args)}",
        "device": f"none: fake tensors, as of CUDA {torch.version.cuda}",
        "seconds": round(time.perf_counter() - began, 1),
        "figures": figures,
        "remarks": ["An operator counts as one kernel; see benchmarks/launches.py."],
    }
    common.write_report(args.output, "launches", args.threads, report)


def count(settings: dict) -> dict[str, dict]:
    """Launches and operators of a plain step's parts and of the whole; the first step is not it."""
    if settings["objective"] == "lcr":
        raise InputError("lcr takes a gradient inside its loss, which fake tensors cannot do here.")
    plain = {"TRAIN.COMPILE": False, "TRAIN.CHECKPOINTING": False}
    cfg = options(settings | {"options": settings["options"] | plain})
    with fake_run(cfg) as run:
        batch = cfg.TRAIN.BATCH_SIZE_PER_GPU
        sizes = build.augmentation(cfg).sizes
        crops = [torch.randn(batch, 3, size, size, device=GPU) for size in sizes]
        batches = itertools.repeat(Batch(crops, torch.arange(batch), []))
        with Launches() as counted:
            run.train_step(batches)
            counted.operators.clear()
            run.train_step(batches)
    figures = {"whole step": sum(counted.operators.values(), Counter())} | counted.operators
    return {
        part: {"launches": found.total(), "operators": dict(found.most_common())}
        for part, found in sorted(figures.items(), key=lambda item: -item[1].total())
    }


# Counting


class Launches(TorchDispatchMode):
    """Counts kernels in its block: operators[part][operator's name]."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if kernels := kernels_of(func, args):
            self.operators[part_of(sys._getframe())][name] += kernels
        # It changes what it is given, gives nothing back, and is not made for fake tensors.
        return None if name == "_fused_sgd_" else func(*args, **(kwargs or {}))


def kernels_of(func: torch._ops.OpOverload, args: Sequence) -> int:
    """How many kernels one call of an operator starts."""
    name, returns = func.overloadpacket.__name__, func._schema.returns
    alias = returns[0].alias_info if returns else None
    if name in NO_KERNEL or (alias is not None and not alias.is_write):
        return 0
    lists = [arg for arg in args if isinstance(arg, list | tuple) and len(arg)]
    lists = [arg for arg in lists if isinstance(arg[0], Tensor)]
    if name in ("cat", "stack"):
        contiguous = all(tensor.is_contiguous() for tensor in lists[0])
        return -(-len(lists[0]) // (CAT_INPUTS if contiguous else CAT_INPUTS // 2))
    if not name.startswith(("_foreach", "_fused")):
        return 1
    if name.startswith("_fused_adam"):
        lists = lists[:4]  # the steps' counts have a place of their own
    if not takes_fused_path(lists):
        return len(lists[0])
    if name == "_foreach_norm":
        return multi_tensor(lists[0], 1) + 3  # two fills before, and the blocks' sums after
    return multi_tensor(lists[0], len(lists) + (not name.endswith("_")))


def takes_fused_path(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether torch gives these lists to one kernel: one dtype, dense, and of the same layout."""
    for tensors in zip(*lists, strict=True):
        first, *others = tensors
        if first.dtype != lists[0][0].dtype or not is_dense(first):
            return False
        layout = (first.dtype, first.shape, first.stride())
        if any((other.dtype, other.shape, other.stride()) != layout for other in others):
            return False
    return True


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory, each once."""
    order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim))
    return tensor.permute(order).is_contiguous()


def multi_tensor(tensors: Sequence[Tensor], depth: int) -> int:
    """Kernels for `depth` lists of tensors like these."""
    launches = blocks = places = 0
    for tensor in tensors:
        places += 1
        left = -(-tensor.numel() // BLOCK)
        while blocks + left >= MOST_BLOCKS:
            left -= MOST_BLOCKS - blocks
            launches, blocks, places = launches + 1, 0, 1 if left else 0
        blocks += left
        if places == MOST_TENSORS[depth - 1]:
            launches, blocks, places = launches + 1, 0, 0
    return launches + (places > 0)


# Parts of a step


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """loss.backward() node by node, for autograd's engine asks a GPU for its streams."""
    order, entered, stack = [], set(), [(loss.grad_fn, False)]
    while stack:
        node, is_left = stack.pop()
        if is_left:
            order.append(node)
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    arrived = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in reversed(order):
        gradients = arrived.pop(node, None)
        if gradients is None:
            continue
        if (parameter := getattr(node, "variable", None)) is not None:
            # A gradient of the parameter's layout is taken as it is.
            (gradient,) = gradients
            taken = gradient.stride() == parameter.stride()
            parameter.grad = gradient if taken else gradient.clone(memory_format=_like(parameter))
            continue
        call = node if callable(node) else node.apply  # of our own functions
        found = call(*gradients)
        found = found if isinstance(found, tuple) else (found,)
        # Our own functions give None, too, for what is no tensor, behind their tensors.
        for (child, place), gradient in zip(node.next_functions, found, strict=False):
            if child is None or gradient is None:
                continue
            inputs = child._input_metadata
            gradient = gradient.sum_to_size(inputs[place].shape).to(inputs[place].dtype)
            places = arrived.setdefault(child, [None] * len(inputs))
            before = places[place]
            places[place] = gradient if before is None else before + gradient


def _like(parameter: Tensor) -> torch.memory_format:
    dense = parameter.is_contiguous()
    return torch.contiguous_format if dense else torch.channels_last


def _code(function: Callable) -> CodeType:
    return inspect.unwrap(function).__code__


PARTS = {
    _code(Network.forward): "forward",
    _code(Objective.__call__): "losses",
    _code(Contrastive.__call__): "losses",
    _code(backward): "backward",
    _code(Clipping.__call__): "clipping",
    _code(step_if): "optimizer",
    _code(TeacherEMA.update): "teacher's average",
    _code(Centres.collect): "centres",
    _code(Centres.update): "centres",
    _code(StepGuard.note): "guard",
    _code(RunningStatistics.copy): "guard",
    _code(RunningStatistics.keep_if): "guard",
    _code(health.measure): "health",
}


def part_of(frame) -> str:
    """The part of a step that a call came from."""
    while frame is not None and frame.f_code not in PARTS:
        frame = frame.f_back
    part = "rest" if frame is None else PARTS[frame.f_code]
    if part == "forward":
        return "student" if torch.is_grad_enabled() else "teacher"
    return part


# A GPU that is not there


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_
) -> Tensor:
    """The memory-efficient kernel, which torch takes for a bias, in its alignment."""
    if attn_mask is not None and attn_mask.shape[-1] % 16:
        columns = attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, -columns % 16))[..., :columns]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, torch.is_grad_enabled())[0]


@contextlib.contextmanager
def fake_run(cfg: Node) -> Iterator[Pretraining]:
    """A run at its first step, on a GPU of fake tensors that there is in this block."""
    with torch.device("meta"):
        networks = build.networks(cfg)

    def to_empty(module: nn.Module, device: torch.device) -> nn.Module:
        return module.to_empty(device=device)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (F, "scaled_dot_product_attention", fused_attention),
            (nn.Module, "to", to_empty),
            (Tensor, "backward", backward),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield Pretraining.build(cfg, World(0, 1, GPU), *networks, steps_per_epoch=100)


if __name__ == "__main__":
    run_script(main)
