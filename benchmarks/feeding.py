"""Ways of feeding: from stored images to crops on the device, put together as main_cmd.py does.

`workers`: crops of one image at a time by the loader's processes; `decode`: images decoded by
them and cropped by the batch on the device; `shards`: the same out of tar shards; `ram` and
`device`: images decoded once and kept there. Without a folder of images there are drawn ones.
"""

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import common, own_step
from benchmarks.turns import synchronize
from datasets.feed import step_sampler
from datasets.fine_grained import build_dataset
from datasets.loader import Batch, usable_workers
from datasets.shards import write_shards
from engine import build
from utils.distributed import World
from utils.errors import InputError

WAYS = {
    "workers": {"DATA.CROPS": "workers", "DATA.CACHE": "none"},
    "decode": {"DATA.CROPS": "device", "DATA.CACHE": "none"},
    "shards": {"DATA.CROPS": "device", "DATA.CACHE": "none", "DATA.DATASET": "shards"},
    "ram": {"DATA.CROPS": "device", "DATA.CACHE": "ram"},
    "device": {"DATA.CROPS": "device", "DATA.CACHE": "device"},
}
DRAWN_SIZE = (375, 500)  # pixels, as many photographs of ImageNet have
STEPS = 10**9  # that a loader expects: were it to run dry, its last batches would come free


def add_feeding_options(parser: argparse.ArgumentParser) -> None:
    """What measurements with a loader ask: images, ways, loader processes, turns."""
    # On the CPU, what is kept on the device is kept in memory.
    ways = [way for way in WAYS if way != "device" or common.device() == "cuda"]
    parser.add_argument("--data_path", default="", help="folder of images; else they are drawn")
    parser.add_argument(
        "--images", type=common.positive, default=256, help="that are drawn (%(default)s)"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=ways, help="of feeding")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (%(default)s)")
    parser.add_argument("--cache_size", type=int, default=448, help="pixels, DATA.CACHE_SIZE")
    parser.add_argument(
        "--turns", type=common.positive, default=3, help="of each way (%(default)s)"
    )
    parser.add_argument("--warm_up", type=int, default=2, help="batches that do not count")


# Images


def draw_photographs(folder: Path, count: int) -> Path:
    """JPEGs whose detail falls with its frequency as a photograph's: equal octaves of noise."""
    folder.mkdir()
    height, width = DRAWN_SIZE
    for index in range(count):
        generator = torch.Generator().manual_seed(index)

        def octave(channels: int, pixels: int, generator: torch.Generator = generator) -> Tensor:
            sides = (height // pixels + 2, width // pixels + 2)
            noise = torch.randn(1, channels, *sides, generator=generator)
            return F.interpolate(noise, DRAWN_SIZE, mode="bicubic")[0]

        grey, colour = (sum(octave(c, 2**n) for n in range(1, 8)) for c in (1, 3))
        pixels = (118 + 22 * grey + 7 * colour).clamp(0, 255).byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:06d}.jpg", quality=90)
    return folder


@contextlib.contextmanager
def stored_images(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Where each way of `args.ways` finds its images, inside the block."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data_path or draw_photographs(Path(scratch, "images"), args.images)
        paths = dict.fromkeys(args.ways, str(folder))
        if "shards" in args.ways:
            write_shards(folder, Path(scratch, "shards"))
            paths["shards"] = str(Path(scratch, "shards"))
        yield paths


def described(args: argparse.Namespace) -> str:
    """The images in words, for a report."""
    height, width = DRAWN_SIZE
    return Path(args.data_path).name or f"{args.images} drawn JPEGs of {width} x {height} pixels"


# Feeding


class Feeding:
    """One way from stored images to crops, put together as main_cmd.py does it."""

    def __init__(self, settings: dict, way: str, path: str, args: argparse.Namespace) -> None:
        own = {"DATA.PATH": path, "DATA.WORKERS": args.workers, "DATA.CACHE_SIZE": args.cache_size}
        options = settings["options"] | own | WAYS[way]
        self.cfg = own_step.options(settings | {"options": options})
        self.world = World(0, 1, torch.device(settings["device"]))
        self.images = build_dataset(self.cfg.DATA.DATASET, path)
        self.workers = usable_workers(self.cfg.DATA.WORKERS)
        began = time.perf_counter()
        self.feed = build.feed(self.cfg, self.images, self.world)
        synchronize(settings["device"])
        self.figures = {"how": self.feed.description, "loader_processes": self.workers}
        if self.cfg.DATA.CACHE != "none":
            self.figures |= {
                "fill_seconds": time.perf_counter() - began,
                "kept_gib": self.feed.kept.bytes / 2**30,
            }

    def batches(self) -> Iterator[Batch]:
        """Crops on the device, from the run's first step on.

        The loader ends when nothing holds the iterator.
        """
        train, world = self.cfg.TRAIN, self.world
        batch, accumulation = train.BATCH_SIZE_PER_GPU, train.ACCUM_STEPS
        sampler = step_sampler(self.images, batch, accumulation, world, self.cfg.SEED, 0, STEPS)
        return self.feed.batches(sampler, self.workers)

    def take_crops(self, batches: Iterator[Batch]) -> None:
        """The next batch, used for nothing."""
        batch = next(batches)
        if batch.bad:
            raise InputError(str(batch.bad[0]))


# Windows


def whole_bursts(batches: int, workers: int) -> int:
    """Batches, raised to a multiple of the loader's processes, which bring them in bursts."""
    return -(-batches // max(1, workers)) * max(1, workers)


def window(take: Callable[[], object], warm_up: int, counted: int) -> tuple[float, float]:
    """Seconds that `counted` calls take after `warm_up` others, and those of all cores together."""
    device = common.device()
    for _ in range(warm_up):
        take()
    synchronize(device)
    began, cores = time.perf_counter(), core_seconds()
    for _ in range(counted):
        take()
    synchronize(device)
    return time.perf_counter() - began, core_seconds() - cores


def core_seconds() -> float:
    """Time on a core that this process and its living children have had."""
    ticks = 0
    for child in multiprocessing.active_children():
        # The name, in brackets, may hold spaces; utime and stime are fields 14 and 15.
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
