"""What a run takes of the machine: memory and disk."""

import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from datasets import cache
from engine import build
from engine.preflight.findings import Findings, size_in_words
from engine.training.acceleration import checkpoint_blocks, compile_network
from engine.training.freezing import Freezing
from engine.training.resume import Found, start_from
from models.network import Network, student_only
from utils.config import Node
from utils.distributed import World, processes_here
from utils.errors import InputError
from utils.precision import precision_of


def memory_held(
    cfg: Node, world: World, kept: int, found: Found | None, findings: Findings
) -> dict:
    """The section of memory: what is held all the time, but not what a step needs besides.

    kept: bytes of DATA.CACHE. found: the checkpoint that the run would go on from. Raises
    InputError where the networks cannot be built or do not take these crops.
    """
    student, teacher = build.networks(cfg)
    if found is None:
        findings.attempt(lambda: start_from(cfg, student, teacher))
    Freezing(cfg, student, teacher).enter(cfg.TRAIN.EPOCHS)
    stored = _stored(cfg, student, teacher)
    # Both refuse where they cannot be.
    if cfg.TRAIN.CHECKPOINTING:
        findings.attempt(lambda: checkpoint_blocks(student))
    if cfg.TRAIN.COMPILE:
        findings.attempt(lambda: compile_network(student))
    if kept:
        cap, on_device = cfg.DATA.CACHE_SIZE, cfg.DATA.CACHE == "device"
        findings.attempt(lambda: cache.refuse_no_room(kept, cap, world.device, on_device))
    free = cache.available()
    return {
        "device": str(world.device),
        "precision": precision_of(cfg, world.device),
        **{f"{name}_bytes": size for name, size in stored.items()},
        "decoded_images_bytes": kept,
        "processes_here": processes_here(),
        "free_on_this_machine_bytes": None if free == sys.maxsize else free,
    }


def checkpoint_size(cfg: Node, student: Network, teacher: Network) -> int:
    """Bytes of a checkpoint of a run of these options and networks."""
    return _stored(cfg, student, teacher)["checkpoint"]


def _stored(cfg: Node, student: Network, teacher: Network) -> dict[str, int]:
    """Bytes that last from step to step, and those of a checkpoint."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    moments = _bytes(trained)  # SGD's momentum
    if cfg.TRAIN.OPTIMIZER == "adamw":
        moments = 2 * moments + 4 * len(trained)  # and step counts
    stored = {
        "student": _bytes(student.state_dict().values()),
        "teacher": _bytes(teacher.state_dict().values()),
        "optimizer": moments,
        "carried": _bytes(build.carried(cfg, build.objective(cfg)).state_dict().values()),
    }
    own = _bytes(student_only(student.state_dict()).values())
    return stored | {"checkpoint": sum(stored.values()) + own}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def disk_needed(cfg: Node, folder: Path, size: int) -> dict:
    """The section of the disk: checkpoints of `size` bytes in the run's folder."""
    kept = cfg.TRAIN.EPOCHS // cfg.CKPT.KEEP_EVERY if cfg.CKPT.KEEP_EVERY else 0
    kept += cfg.CKPT.KEEP == "best"
    # The last two, the one that is being written, and those that stay; some may be there.
    stats = [path.stat() for path in folder.glob("*.pth") if path.is_file()]
    there = {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}
    return {
        "path": str(folder),
        "checkpoint_bytes": size,
        "checkpoints_kept_for_good": kept,
        "needed_bytes": max(0, (3 + kept) * size - sum(there.values())),
        "free_bytes": shutil.disk_usage(folder).free,
    }


def short_disk(disk: dict) -> Iterator[str]:
    """A sentence where the disk is short; disk: of `disk_needed`.

    Raises InputError where not one checkpoint can be written.
    """
    if disk["needed_bytes"] > disk["free_bytes"]:
        free, size = disk["free_bytes"], disk["checkpoint_bytes"]
        if size > free:
            raise InputError(
                f"a checkpoint takes about {size_in_words(size)} in {disk['path']}, and "
                f"{size_in_words(free)} are free: make room, or choose another --output_dir"
            )
        yield (
            f"the checkpoints will take about {size_in_words(disk['needed_bytes'])} in "
            f"{disk['path']}, and {size_in_words(free)} are free: make room, or keep fewer "
            "(CKPT.KEEP_EVERY)"
        )
