"""What a run takes of the machine, for --check: memory, shared memory and disk."""

import os
import shutil
import sys
from pathlib import Path

import torch

from datasets import cache
from datasets.loader import usable_workers
from engine import build
from engine.preflight import memory
from engine.preflight.findings import Findings, size_in_words
from engine.training.acceleration import compile_network
from engine.training.resume import Found, start_from
from utils.config import Node, crops_on_device
from utils.distributed import World
from utils.precision import precision_of

# Bytes that a process takes besides its tensors. Measured on a CPU: 0.75 GiB for Python, torch and
# what they load, 0.1 GiB for kernels' own.
PROGRAM = 2**30
BATCHES_AHEAD = 2  # that torch's loader prepares for each worker


def memory_needed(
    cfg: Node, world: World, kept: int, found: Found | None, findings: Findings
) -> dict:
    """The section of memory.

    kept: bytes of DATA.CACHE. found: the checkpoint that the run would go on from. Raises
    InputError where the networks cannot be built or do not take these crops.
    """
    student, teacher = build.networks(cfg)
    if found is None:
        findings.attempt(lambda: start_from(cfg, student, teacher))
    step = memory.of_step(cfg, world, student, teacher)
    if cfg.TRAIN.COMPILE:
        findings.attempt(lambda: compile_network(student))  # refuses where there is no compiler
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = world.device.type == "cuda"
    kept_on_gpu = on_gpu and cfg.DATA.CACHE == "device"
    ahead = 0 if crops_on_device(cfg) else BATCHES_AHEAD * usable_workers(cfg.DATA.WORKERS)
    loader = ahead * step.crops
    # A checkpoint is written from a copy of the tensors, by one process.
    needed = here * (PROGRAM + loader + (0 if on_gpu else step.peak)) + step.checkpoint + kept
    free = cache.available()
    section = {
        "device": str(world.device),
        "precision": precision_of(cfg, world.device),
        "images_at_once": cfg.TRAIN.BATCH_SIZE_PER_GPU,
        "checkpointing": cfg.TRAIN.CHECKPOINTING,
        **{f"{name}_bytes": size for name, size in vars(step).items()},
        "step_at_its_peak_bytes": step.peak,
        "decoded_images_bytes": kept,
        "crops_in_the_loader_bytes": loader,
        "processes_here": here,
        "needed_on_this_machine_bytes": needed,
        "free_on_this_machine_bytes": None if free == sys.maxsize else free,
    }
    _warn_if_short("this machine", needed, free, findings)
    if on_gpu:
        needed = step.peak + (kept if kept_on_gpu else 0)
        free = torch.cuda.mem_get_info(world.device)[0]
        section |= {"needed_on_the_gpu_bytes": needed, "free_on_the_gpu_bytes": free}
        _warn_if_short(str(world.device), needed, free, findings)
    if kept:
        device = world.device if kept_on_gpu else None
        too_large = cache.too_large(kept, cfg.DATA.CACHE_SIZE, device)
        findings.problems += [too_large] if too_large else []
    _judge_shared_memory(here * loader, findings)
    return section


def _warn_if_short(where: str, needed: int, free: int, findings: Findings) -> None:
    if needed > free:
        findings.warnings.append(
            f"the run needs about {size_in_words(needed)} of memory on {where}, and "
            f"{size_in_words(free)} are free: lower --batch_size_per_gpu (and raise "
            "--accum_steps), or set TRAIN.CHECKPOINTING true"
        )


def _judge_shared_memory(needed: int, findings: Findings) -> None:
    """Loader workers hand batches over in /dev/shm, which is small in many containers."""
    shared = Path("/dev/shm")
    if needed and shared.is_dir() and needed > (free := shutil.disk_usage(shared).free):
        findings.warnings.append(
            f"the loader's batches take up to {size_in_words(needed)} of shared memory, and "
            f"{shared} has {size_in_words(free)}: make it larger (docker run --shm-size), or lower "
            "--num_workers"
        )


def disk_needed(
    cfg: Node, folder: Path, size: int, found: Found | None, findings: Findings
) -> dict:
    """The section of the disk: checkpoints of `size` bytes in the run's folder."""
    kept = cfg.TRAIN.EPOCHS // cfg.CKPT.KEEP_EVERY if cfg.CKPT.KEEP_EVERY else 0
    # The last two, the one that is being written, and those that stay; some may be there.
    stats = [path.stat() for path in folder.glob("*.pth") if path.is_file()]
    there = {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}
    needed = max(0, (3 + kept) * size - sum(there.values()))
    free = shutil.disk_usage(folder).free
    if size > free:
        findings.problems.append(
            f"a checkpoint takes about {size_in_words(size)} in {folder}, and "
            f"{size_in_words(free)} are free: make room"
        )
    elif needed > free:
        findings.warnings.append(
            f"the checkpoints will take about {size_in_words(needed)} in {folder}, and "
            f"{size_in_words(free)} are free: make room"
        )
    return {
        "path": str(folder),
        "checkpoint_bytes": size,
        "checkpoints_kept_for_good": kept,
        "needed_bytes": needed,
        "free_bytes": free,
        **({"goes_on_from_step": found.state["step"]} if found else {}),
    }
