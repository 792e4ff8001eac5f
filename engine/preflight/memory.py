"""How much memory a step takes, without taking it: a step on tensors that have no data."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import build
from engine.training.acceleration import checkpoint_blocks
from engine.training.optim import build_optimizer
from models import swin
from models.network import Network, student_only
from utils.config import Node
from utils.distributed import World
from utils.errors import InputError
from utils.options import COMPARING
from utils.precision import autocast, precision_of


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process's tensors on its device.

    peak: the most that is held at once in a step. activations: what the student's forward of a
    micro-batch keeps for the backward pass, and `recomputed` the same with
    TRAIN.CHECKPOINTING, None where the backbone cannot. gradients: they come while the
    activations go. checkpoint: of the file. The rest are held all the time, `crops` during the
    forward.
    """

    peak: int
    student: int
    teacher: int
    optimizer: int
    carried: int
    crops: int
    activations: int
    recomputed: int | None
    gradients: int
    checkpoint: int

    def at_peak(self, checkpointing: bool) -> int:
        """Bytes at the peak that no other field names: the loss, the teacher's views, scratch."""
        kept = self.recomputed if checkpointing else self.activations
        held = self.student + self.teacher + self.optimizer + self.carried + self.crops
        return max(0, self.peak - held - (kept or 0))


def of_step(cfg: Node, world: World, student: Network, teacher: Network) -> StepMemory:
    """The memory of an optimizer step of these options, by going through one on fake tensors.

    Fake tensors (torch._subclasses) have a shape, a type and a device, and no data: operators
    only work out what would come of them. All storages that come and go are counted, so this is
    what the allocator is asked for; its own rounding, kernels' private scratch, and what Python
    and torch take by themselves (about half a GiB, on a GPU as much again) come on top. With
    TRAIN.COMPILE less is held than this says; shuffled keys (shuffling.py) take one view of
    all processes' crops on top, twice. (Ours.)

    Both networks are given parameters without data: they are of no use afterwards. Raises
    InputError where the backbone cannot do TRAIN.CHECKPOINTING.
    """
    with _no_masks_kept(), FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        step = _Step(cfg, world, student, teacher, live)
        if cfg.TRAIN.CHECKPOINTING:
            plain = step.forward()
            checkpoint_blocks(student)
            peak, recomputed = step.peak()
        else:
            peak, plain = step.peak()
            recomputed = None
            with contextlib.suppress(InputError):
                checkpoint_blocks(student)
                recomputed = step.forward()
        sizes = {
            "student": _bytes(student.state_dict()),
            "teacher": _bytes(teacher.state_dict()),
            "optimizer": _bytes(step.optimizer.state_dict()),
            "carried": _bytes(step.carried.state_dict()),
        }
        return StepMemory(
            **sizes,
            peak=peak,
            crops=_bytes(step.crops),
            activations=plain,
            recomputed=recomputed,
            gradients=_bytes(step.trained),
            checkpoint=sum(sizes.values()) + _bytes(student_only(student.state_dict())),
        )


class _Step:
    """What a step of these options holds between steps, on fake tensors, and its passes."""

    def __init__(
        self, cfg: Node, world: World, student: Network, teacher: Network, live: "_Live"
    ) -> None:
        self.cfg, self.device, self.live = cfg, world.device, live
        self.student, self.teacher = student, teacher
        for network in (student, teacher):
            _without_data(network, world.device)
        self.precision = precision_of(cfg, world.device)
        self.objective = build.objective(cfg)
        self.carried = build.carried(cfg, self.objective).to(world.device)
        gathers = cfg.CMD.LT in COMPARING
        if world.size > 1 and self.objective.needs_pooling and gathers:
            # These terms gather from the other processes, who take no step here; what they hold
            # lasts for themselves alone.
            self.objective = replace(self.objective, lt="none")
        self.optimizer = build_optimizer(cfg.TRAIN.OPTIMIZER, student)
        self.trained = [p for p in student.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()  # makes the moments
        # Micro-batches add to the gradients of those before; DistributedDataParallel keeps room.
        self.keeps_gradients = world.size > 1 or cfg.TRAIN.ACCUM_STEPS > 1
        batch = cfg.TRAIN.BATCH_SIZE_PER_GPU
        self.crops = [
            torch.empty(batch, 3, size, size, device=world.device)
            for size in build.augmentation(cfg).sizes
        ]

    def forward(self) -> int:
        """Bytes that the student's forward leaves, but for the pooling of the teacher's views."""
        before = self.live.now
        with autocast(self.precision, self.device):
            views = self.student(self.crops[self.objective.student_crops])
        kept = self.live.now - before
        del views
        return kept

    def peak(self) -> tuple[int, int]:
        """The most bytes held at once in a micro-batch, and those that the forward leaves."""
        if not self.keeps_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        live = self.live
        live.peak = live.now
        with autocast(self.precision, self.device):
            with torch.no_grad():
                teacher = self.teacher(self.crops[self.objective.teacher_crops])
            before = live.now
            seen = self.crops[self.objective.student_crops]
            if self.student.pool is None:
                student = self.student(seen)
            else:
                student, teacher = self.student(seen, teacher)
            kept = live.now - before
            total, *_ = self.objective(student, teacher, self.carried, self.cfg.LOSS.TEACHER_TEMP)
        del student, teacher, _
        total.backward()
        return live.peak, kept


def _without_data(network: nn.Module, device: torch.device) -> None:
    """Give a network fake parameters and buffers of the same shapes, on the device."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty_like(parameter, device=device)
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=device))


class _Live(TorchDispatchMode):
    """Counts the storages that operators make, while they last; `now` and `peak` in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += self._known[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


@contextlib.contextmanager
def _no_masks_kept() -> Iterator[None]:
    """Swin keeps its masks from call to call: a real one and a fake one must not meet."""
    kept = dict(swin._masks)
    swin._masks.clear()
    try:
        yield
    finally:
        swin._masks.clear()
        swin._masks.update(kept)


def _bytes(values: Any) -> int:
    """Of all tensors in nested data."""
    leaves: Iterable = tree_leaves(values)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
