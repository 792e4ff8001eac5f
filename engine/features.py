"""Features of a folder of labelled images, in order, by a backbone in eval mode."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.folder import ImageFolder
from datasets.loader import BadImage, GuardedDataset, collate
from datasets.multicrop import eval_transform
from utils.errors import InputError
from utils.logging import on_terminal


def labelled_folder(root: str | Path, size: int, resize: int | None = None) -> ImageFolder:
    """Images with class subfolders, centre-cropped to `size` pixels after a resize.

    Raises InputError where the folder has no classes.
    """
    dataset = ImageFolder(root, eval_transform(size, resize))
    if not dataset.classes:
        raise InputError(
            f"{root} has images outside class subfolders: an evaluation needs one subfolder "
            f"for each class."
        )
    return dataset


def gallery_and_queries(
    gallery: str | Path, queries: str | Path, size: int, resize: int | None = None
) -> tuple[ImageFolder, ImageFolder]:
    """Two labelled folders whose labels mean the same: the gallery's numbering of classes.

    Raises InputError where the queries have a class that the gallery lacks.
    """
    first, second = (labelled_folder(root, size, resize) for root in (gallery, queries))
    number = {name: index for index, name in enumerate(first.classes)}
    unknown = [name for name in second.classes if name not in number]
    if unknown:
        raise InputError(
            f"{queries} has classes that {gallery} lacks: {', '.join(unknown[:5])}. Both folders "
            f"must use the same names for their class subfolders."
        )
    second.labels = [number[second.classes[label]] for label in second.labels]
    return first, second


@torch.inference_mode()
def extract(
    function: Callable[[Tensor], Tensor],
    dataset: ImageFolder,
    device: torch.device,
    batch: int = 64,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """`function` over all images, in order -> outputs [n, ...] float32 and labels [n], on the CPU.

    function: images [b, 3, S, S] on the device -> a tensor [b, ...].
    Raises InputError for an image that cannot be read.
    """
    loader = DataLoader(
        GuardedDataset(dataset),
        batch_size=batch,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),
    )
    outputs, labels = [], []
    for loaded in tqdm(loader, desc="features", leave=False, disable=not on_terminal()):
        if isinstance(loaded, BadImage):
            raise InputError(str(loaded))
        images, targets = loaded
        outputs.append(function(images.to(device)).float().cpu())
        labels.append(targets)
    return torch.cat(outputs), torch.cat(labels)
