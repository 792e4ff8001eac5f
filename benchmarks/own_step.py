"""A training step of this project on drawn crops: what the measurements of the step run.

Started by benchmarks.step in a process of its own: python -m benchmarks.own_step SETTINGS.
"""

import functools
import itertools
import json
import sys
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import turns
from datasets.loader import Batch
from engine import build
from engine.training.step import Pretraining
from utils import config
from utils.distributed import ALONE, World
from utils.errors import run_script

# Options without which a step's arithmetic is counted, once for contestants that differ in them.
SAME_ARITHMETIC = ("TRAIN.COMPILE", "TRAIN.CHECKPOINTING", "LOSS.CHUNK_MIB")


def options(settings: dict) -> config.Node:
    """The run's options for a measurement's settings (see benchmarks.step)."""
    cfg = config.defaults()
    named = {
        "MODEL.ARCH": settings["arch"],
        "LOSS.OBJECTIVE": settings["objective"],
        "HEAD.OUT_DIM": settings["prototypes"],
        "TRAIN.BATCH_SIZE_PER_GPU": settings["batch"],
        "TRAIN.PRECISION": settings["precision"],
        "TRAIN.FREEZE_LAST_LAYER": 0,
        "AUG.GLOBAL_CROPS_SIZE": settings["global_size"],
        "AUG.LOCAL_CROPS_NUMBER": [settings["local_crops"]],
        "AUG.LOCAL_CROPS_SIZE": [settings["local_size"]],
        **settings["options"],
    }
    for key, value in named.items():
        config.put(cfg, key, value, "the benchmark")
    config.check(cfg)
    return cfg


def pretraining(settings: dict) -> Pretraining:
    """A run of one process at its first step."""
    torch.set_num_threads(settings["threads"])
    cfg = options(settings)
    world = World(0, 1, torch.device("cuda", 0)) if settings["device"] == "cuda" else ALONE
    student, teacher = (network.to(world.device) for network in build.networks(cfg))
    return Pretraining.build(cfg, world, student, teacher, steps_per_epoch=100)


def drawn_batches(run: Pretraining) -> Iterator[Batch]:
    """The same drawn crops for ever, on the device."""
    generator = torch.Generator().manual_seed(0)
    batch = run.cfg.TRAIN.BATCH_SIZE_PER_GPU
    crops = [
        torch.randn(batch, 3, size, size, generator=generator).to(run.world.device)
        for size in build.augmentation(run.cfg).sizes
    ]
    return itertools.repeat(Batch(crops, torch.arange(batch), []))


def count_flops(settings: dict) -> int:
    """Floating-point operations of one step (2 for a multiply-add), by torch's counter.

    Without TRAIN.COMPILE, whose graphs hide them, and TRAIN.CHECKPOINTING, which adds to them.
    """
    options = {k: v for k, v in settings["options"].items() if k not in SAME_ARITHMETIC}
    return _counted(json.dumps(settings | {"precision": "fp32", "options": options}))


@functools.cache
def _counted(settings: str) -> int:
    run = pretraining(json.loads(settings))
    with FlopCounterMode(display=False) as counter:
        run.train_step(drawn_batches(run))
    return counter.get_total_flops()


def main() -> None:
    answers, settings = turns.take_stdout(), json.loads(sys.argv[1])
    run = pretraining(settings)
    batches = drawn_batches(run)
    turns.serve(lambda: run.train_step(batches), settings["device"], answers)


if __name__ == "__main__":
    run_script(main)
