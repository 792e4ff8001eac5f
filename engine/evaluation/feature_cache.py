"""Features on the disk: written once, used by every protocol, refused where they do not fit.

A file is safetensors: the features, their labels, the images' paths, and in its metadata what
made them (the checkpoint's sha256 among it), so that no figure comes from stale features.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.checkpoint import save_safetensors
from utils.errors import InputError
from utils.files import make_folder

FORMAT = "1"


@dataclass(frozen=True)
class Features:
    """Features of one split.

    values: float32 [n, D], the parts of an Encoder side by side, of `widths` columns each; the
    last part is the patches' mean where `avgpool_patchtokens`. labels int64 [n] index
    `classes`. paths: relative to `root`. bad: images that were left out, one line each.
    made_by: what decides the values, by name.
    """

    values: Tensor
    labels: Tensor
    paths: list[str]
    classes: list[str]
    root: str
    widths: list[int]
    avgpool_patchtokens: bool
    bad: list[str]
    made_by: dict[str, str]

    def narrowed(self, blocks: int, avgpool_patchtokens: bool = False) -> "Features":
        """These features with the columns of the last `blocks` blocks alone (a view).

        And of the patches' mean, if asked for. With one block and without it, they are the
        image feature.
        """
        end = len(self.widths) - (self.avgpool_patchtokens and not avgpool_patchtokens)
        start = end - blocks - avgpool_patchtokens
        columns = slice(sum(self.widths[:start]), sum(self.widths[:end]))
        return replace(
            self,
            values=self.values[:, columns],
            widths=self.widths[start:end],
            avgpool_patchtokens=avgpool_patchtokens,
        )

    def misfit(self, made_by: dict[str, str], blocks: int, avgpool_patchtokens: bool) -> str:
        """Why these features cannot stand for those wanted; empty where they can."""
        for name, wanted in made_by.items():
            held = self.made_by.get(name, "unknown")
            if held == wanted:
                continue
            if name == "weights":
                return f"they come from another checkpoint (sha256 {held[:12]}, not {wanted[:12]})"
            if name == "images":
                return "the images have changed since: their names, sizes, number or labels"
            return f"their {name} is {held}, not {wanted}"
        if avgpool_patchtokens and not self.avgpool_patchtokens:
            return "they lack the mean of the patches"
        held_blocks = len(self.widths) - self.avgpool_patchtokens
        if blocks > held_blocks:
            return (
                f"they hold the last {held_blocks} blocks, not {blocks} (--n_last_blocks "
                f"{held_blocks} takes these)"
            )
        return ""


def save(features: Features, path: Path) -> None:
    """Write the file whole; raises InputError where the disk refuses."""
    tensors = {
        "values": features.values.contiguous(),
        "labels": features.labels,
        "paths": _pack(features.paths),
        "classes": _pack(features.classes),
        "bad": _pack(features.bad),
    }
    metadata = {
        "format": FORMAT,
        "root": json.dumps(features.root),
        "widths": json.dumps(features.widths),
        "avgpool_patchtokens": json.dumps(features.avgpool_patchtokens),
        "made_by": json.dumps(features.made_by),
    }
    make_folder(path.parent, "--dump_features")
    save_safetensors(tensors, metadata, path, "feature file")


def load(path: Path) -> Features:
    """Read a file; raises InputError where there is none, or it is not a whole one of ours."""
    if not path.is_file():
        raise InputError(f"there are no features at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or "made_by" not in metadata:
                raise InputError(f"{path} holds no features that this version wrote.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Features(
            tensors["values"],
            tensors["labels"],
            *(_unpack(tensors[name]) for name in ("paths", "classes")),
            root=json.loads(metadata["root"]),
            widths=json.loads(metadata["widths"]),
            avgpool_patchtokens=json.loads(metadata["avgpool_patchtokens"]),
            bad=_unpack(tensors["bad"]),
            made_by=json.loads(metadata["made_by"]),
        )
    except (SafetensorError, OSError, KeyError, ValueError):
        raise InputError(f"{path} is not a feature file, or is damaged.") from None


def _pack(lines: list[str]) -> Tensor:
    """Text as bytes: the header of a safetensors file is too small for a million paths."""
    data = "\0".join(lines).encode(errors="surrogateescape")
    return torch.from_numpy(np.array(bytearray(data), dtype=np.uint8))


def _unpack(packed: Tensor) -> list[str]:
    text = packed.numpy().tobytes().decode(errors="surrogateescape")
    return text.split("\0") if text else []
