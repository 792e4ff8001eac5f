"""What a run takes of the machine: memory, shared memory and disk."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import cache
from datasets.loader import usable_workers
from engine import build
from engine.preflight import memory
from engine.preflight.findings import Findings, size_in_words
from engine.preflight.memory import Size
from engine.training.acceleration import compile_network
from engine.training.resume import Found, start_from
from utils.config import Node
from utils.distributed import World, processes_here
from utils.errors import InputError
from utils.precision import precision_of

# Bytes that a process takes besides its tensors. Measured on a CPU: 0.75 GiB for Python, torch and
# what they load, 0.1 GiB for kernels' own.
PROGRAM = 2**30
BATCHES_AHEAD = 2  # that torch's loader prepares for each worker
SHARED = Path("/dev/shm")


def memory_needed(
    cfg: Node,
    world: World,
    kept: int,
    sizes: Sequence[Size],
    found: Found | None,
    findings: Findings,
) -> dict:
    """The section of memory.

    kept: bytes of DATA.CACHE. sizes: the two sides of a sample of the images. found: the checkpoint
    that the run would go on from. Raises InputError where the networks cannot be built or do not
    take these crops.
    """
    student, teacher = build.networks(cfg)
    if found is None:
        findings.attempt(lambda: start_from(cfg, student, teacher))
    step = memory.of_step(cfg, world, student, teacher)
    if cfg.TRAIN.COMPILE:
        findings.attempt(lambda: compile_network(student))  # refuses where there is no compiler
    here = processes_here()
    on_gpu = world.device.type == "cuda"
    kept_on_gpu = on_gpu and cfg.DATA.CACHE == "device"
    loader = _in_the_loader(cfg, sizes)
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
        "batches_in_the_loader_bytes": loader,
        "processes_here": here,
        "needed_on_this_machine_bytes": needed,
        "free_on_this_machine_bytes": None if free == sys.maxsize else free,
    }
    findings.warnings += short("this machine", needed, free)
    if on_gpu:
        needed = step.peak + (kept if kept_on_gpu else 0)
        free = cache.free_on(world.device)
        section |= {"needed_on_the_gpu_bytes": needed, "free_on_the_gpu_bytes": free}
        findings.warnings += short(str(world.device), needed, free)
    if kept:
        cap = cfg.DATA.CACHE_SIZE
        findings.attempt(lambda: cache.refuse_no_room(kept, cap, world.device, kept_on_gpu))
    return section


def short(where: str, needed: int, free: int) -> Iterator[str]:
    """A sentence where memory is short."""
    if needed > free:
        yield (
            f"the run needs about {size_in_words(needed)} of memory on {where}, and "
            f"{size_in_words(free)} are free: lower --batch_size_per_gpu (and raise "
            f"--accum_steps), --num_workers or --out_dim, or set TRAIN.CHECKPOINTING true or "
            f"DATA.CACHE none"
        )


def _in_the_loader(cfg: Node, sizes: Sequence[Size]) -> int:
    """Bytes of the batches that one process's loader workers hold ready.

    Of images that are kept they bring random numbers alone.
    """
    ahead = BATCHES_AHEAD * usable_workers(cfg.DATA.WORKERS)
    return ahead * memory.moved_size(cfg, sizes) if cfg.DATA.CACHE == "none" else 0


def refuse_small_shared(cfg: Node, needed: int, free: int) -> None:
    """InputError where the batches of one process's loader do not fit into /dev/shm.

    There loader workers hand them over; it is small in many containers, and where it is full the
    system kills who writes. needed: bytes for each process; free: for all of this machine.
    """
    here = processes_here()
    if here * needed > free:
        raise InputError(
            f"the loader's batches take about {size_in_words(here * needed)} of shared memory, and "
            f"{SHARED} has {size_in_words(free)} for them: make it larger (docker run --shm-size), "
            f"or lower --num_workers, now {usable_workers(cfg.DATA.WORKERS)}"
        )


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


def warnings(cfg: Node, sizes: Sequence[Size], disk: dict | None) -> Iterator[str]:
    """What is short by figures that cost nothing; sizes: of images; disk: of `disk_needed`.

    Raises InputError where not one checkpoint can be written, or shared memory is too small.
    """
    if disk and disk["needed_bytes"] > disk["free_bytes"]:
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
    if SHARED.is_dir():
        refuse_small_shared(cfg, _in_the_loader(cfg, sizes), shutil.disk_usage(SHARED).free)
