"""The registry of data sets."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from datasets.folder import ImageFolder
from utils.errors import InputError

# A new data set is one function (root, transform) -> Dataset of (image, label), and one line.
DATASETS: dict[str, Callable[..., Dataset]] = {
    "folder": ImageFolder,
    "imagenet1k": ImageFolder,  # EsViT's name for a folder with class subfolders
}


def build_dataset(
    name: str, root: str | Path, transform: Callable[[Image.Image], Any] | None = None
) -> Dataset:
    """The data set registered as `name`, read from `root`; raises `InputError`."""
    if name not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        nearest = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"there is no data set '{name}': use one of {known} (the nearest is '{nearest}')"
        )
    return DATASETS[name](root, transform)
