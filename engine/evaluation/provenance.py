"""What stands behind a figure: command, code, versions, device, weights, data, options."""

import datetime
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torchvision

from engine.evaluation.feature_cache import SPLITS, SplitFeatures
from utils import config
from utils.config import Node


def provenance(cfg: Node, features: SplitFeatures) -> dict:
    """Plain data for JSON: what stands behind all figures of a command under these options."""
    source, splits, reading = features.source, features.splits, features.reading
    world = reading.world
    known = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
        },
        "device": device_name(world.device),
        "processes": world.size,
        "config": config.to_dict(cfg),
    }
    if source is not None:
        known["weights"] = asdict(source.weights)
        known["image_size"] = {"crop": reading.size, "resize": reading.resize}
    if splits is not None:
        known["data"] = {
            "name": splits.name,
            "classes": len(splits.train.classes),
            **{
                split: {"root": str(images.root), "images": len(images)}
                for split, images in zip(SPLITS, (splits.train, splits.test), strict=True)
            },
            "notes": splits.notes,
        }
    if features.held:
        known["features"] = {
            split: {"images": len(held.labels), "made_by": held.made_by}
            for split, held in features.held.items()
        }
    if features.bad:
        known["unreadable_images"] = features.bad
    return known


def commit() -> str | None:
    """The commit of this code, with "+changes" where files differ from it; None outside git."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind and number of threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
