"""Small runs inside the test's process, without files; comparing the folders of two runs."""

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from torch import Tensor, nn
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


def config_of(pairs: str) -> config.Node:
    """The defaults with KEY VALUE pairs over them, as typed."""
    cfg, words = config.defaults(), pairs.split()
    for key, value in zip(words[::2], words[1::2], strict=True):
        config.put(cfg, key, value, "the test")
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


def random_crops(batch: int, seed: int, sizes: Sequence[int] = (32, 32, 16, 16)) -> list[Tensor]:
    """Noise as crops [B, 3, S, S]; by default of small_config's sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size, size, generator=generator) for size in sizes]


def crops_for(run: Pretraining, seed: int) -> list[Tensor]:
    """Noise as crops of a micro-batch of the run, on its device: this process's share of all's."""
    aug, share = run.cfg.AUG, run.cfg.TRAIN.BATCH_SIZE_PER_GPU
    sizes = [aug.GLOBAL_CROPS_SIZE] * 2
    if aug.LOCAL_CROPS_NUMBER:
        sizes += aug.LOCAL_CROPS_SIZE * aug.LOCAL_CROPS_NUMBER[0]
    mine = slice(share * run.world.rank, share * (run.world.rank + 1))
    crops = random_crops(share * run.world.size, seed, sizes)
    return [crop[mine].to(run.world.device) for crop in crops]


def shake(module: nn.Module, seed: int) -> nn.Module:
    """Weights away from their initialisation, so that a swapped or unread one shows."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return module


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


def assert_same_bits(first, second) -> None:
    """Tensors, in dicts too, of equal values and types; of all else equality."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same_bits(first[name], second[name])
    elif isinstance(first, Tensor):
        assert torch.equal(first, second)
        assert first.dtype == second.dtype
    else:
        assert first == second


def assert_same_state(first: dict, second: dict) -> None:
    """Weights, centres and optimizer of two checkpoints are equal bit for bit."""
    for part in ("student", "teacher", "carried", "optimizer"):
        left, right = tensors(first[part]), tensors(second[part])
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), f"{part}{name}"
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]


def assert_same_run(first: Path, second: Path) -> None:
    """The last checkpoints of two folders are, and so are the log's figures."""
    assert_same_state(load(first), load(second))
    assert log_of(first) == log_of(second)


def copy_of(run: Path, folder: Path, epoch: int | None = None) -> Path:
    """A copy of a run's folder, to go on in: from the end of an epoch, or from where it ended."""
    shutil.copytree(run, folder)
    if epoch is not None:
        shutil.copy(folder / f"checkpoint{epoch:04d}.pth", folder / "checkpoint.pth")
    return folder


def events_of(folder: Path) -> dict[str, list[int]]:
    """The steps of each scalar that TensorBoard shows, by its tag; every record must be whole.

    Where a start is logged, TensorBoard forgets all events from its step on.
    """
    steps: dict[str, list[int]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length, sum_of_length) = struct.unpack_from("<QI", data, place)
            assert masked_crc32c(data[place : place + 8]) == sum_of_length
            record = data[place + 12 : place + 12 + length]
            (sum_of_data,) = struct.unpack_from("<I", data, place + 12 + length)
            assert masked_crc32c(record) == sum_of_data
            place += 16 + length
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                steps = {tag: [s for s in old if s < event.step] for tag, old in steps.items()}
            for scalar in event.summary.value:
                steps.setdefault(scalar.tag, []).append(event.step)
    return steps


def cfg_of(folder: Path) -> config.Node:
    cfg = config.defaults()
    config.merge_file(cfg, folder / "config.yaml")
    return cfg
