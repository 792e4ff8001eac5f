"""Small runs inside the test's process, without files; comparing the folders of two runs."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.loader import Batch
from engine import build
from engine.training.bad_images import BadImages
from engine.training.record import Record
from engine.training.step import Pretraining
from utils import config
from utils.distributed import ALONE, World

# What the clock decides in a line of the log.
CLOCKED = {"images_per_second", "data_wait"}
# Options that make small_config's network a ResNet-50.
RESNET = {
    "MODEL__ARCH": "resnet50",
    "MODEL__EMBED_DIM": 0,
    "MODEL__DEPTHS": [],
    "MODEL__NUM_HEADS": [],
    "MODEL__PATCH_SIZE": 0,
}
# And these a Swin of two stages.
SWIN = {
    "MODEL__ARCH": "swin_tiny",
    "MODEL__EMBED_DIM": 16,
    "MODEL__DEPTHS": [1, 2],
    "MODEL__NUM_HEADS": [2, 4],
    "MODEL__PATCH_SIZE": 4,
    "MODEL__WINDOW_SIZE": 4,
}


def small_config(**options) -> config.Node:
    """A ViT of two blocks; options as SECTION__KEY=value."""
    cfg = config.defaults()
    settings = {
        "MODEL.ARCH": "vit_small",
        "MODEL.EMBED_DIM": 48,
        "MODEL.DEPTHS": [2],
        "MODEL.NUM_HEADS": [3],
        "MODEL.PATCH_SIZE": 8,
        "MODEL.IMG_SIZE": 32,
        "HEAD.OUT_DIM": 64,
        "HEAD.HIDDEN_DIM": 96,
        "HEAD.BOTTLENECK_DIM": 32,
        "HEAD.POOL_HIDDEN": 16,
        "AUG.GLOBAL_CROPS_SIZE": 32,
        "AUG.LOCAL_CROPS_SIZE": 16,
        "AUG.LOCAL_CROPS_NUMBER": 2,
        "TRAIN.EPOCHS": 2,
        "TRAIN.BATCH_SIZE_PER_GPU": 3,
        "TRAIN.WARMUP_EPOCHS": 0,
        "TRAIN.FREEZE_LAST_LAYER": 0,
        "TRAIN.BASE_LR": 0.05,
    }
    settings |= {key.replace("__", "."): value for key, value in options.items()}
    for key, value in settings.items():
        config.put(cfg, key, value, "the test")
    config.check(cfg)
    return cfg


def pretraining(
    cfg: config.Node, steps_per_epoch: int = 4, device: torch.device = ALONE.device
) -> Pretraining:
    """What main_cmd.py puts together for one process."""
    world = World(0, 1, device)
    return Pretraining.build(cfg, world, *build.networks(cfg), steps_per_epoch)


def record_of(images: int = 0) -> Record:
    """What a run keeps beside its step, at its first one."""
    return Record(BadImages(images, 0.0), "")


def checkpoint_of(run: Pretraining) -> dict:
    """The whole checkpoint of a run that has no log yet."""
    return run.state() | record_of().state()


def batch_of(crops: list[Tensor]) -> Batch:
    """What the loader would bring with these crops [B, 3, S, S]."""
    return Batch(crops, torch.arange(len(crops[0])), [])


class Calls(TorchDispatchMode):
    """The names of the operators that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# Comparing runs


def load(folder: Path, name: str = "checkpoint.pth") -> dict:
    return torch.load(folder / name, weights_only=True)


def log_of(folder: Path) -> list[dict]:
    """log.txt without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]


def tensors(value, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested data, by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found = {}
    for key, inner in pairs:
        if isinstance(inner, dict | list | tuple | torch.Tensor):
            found |= tensors(inner, f"{name}/{key}")
    return found


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, centres and optimizer equal bit for bit, and the log's figures too."""
    states = [load(folder) for folder in (first, second)]
    for part in ("student", "teacher", "carried", "optimizer"):
        left, right = tensors(states[0][part]), tensors(states[1][part])
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), f"{part}{name}"
    rates = [s["optimizer"]["param_groups"] for s in states]
    assert rates[0] == rates[1]
    assert log_of(first) == log_of(second)


def cfg_of(folder: Path) -> config.Node:
    cfg = config.defaults()
    config.merge_file(cfg, folder / "config.yaml")
    return cfg
