"""Features of a frozen network: one an image, of labelled images, by all processes together."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from datasets.folder import LabelledImages
from datasets.loader import BadImage, KeyedDataset, build_loader, usable_workers
from datasets.multicrop import default_resize, eval_transform
from datasets.splits import Splits, paired_folders
from engine.evaluation import attention
from engine.evaluation.source import Source, image_size
from utils import distributed
from utils.config import Node, normalisation
from utils.distributed import World
from utils.errors import InputError
from utils.logging import progress
from utils.normalisation import IMAGENET, Normalisation
from utils.precision import autocast, precision_of

NEEDS = {
    "mil": "mil needs the MIL attention, which only runs of the objective cmd",
    "lcr": "lcr needs LCR's branch, which only runs of the objective lcr",
}


@dataclass
class Encoder:
    """Images [B, 3, S, S] -> features [B, D], float32, by a frozen network.

    pooling: `default`, the features of the last `blocks` blocks concatenated (EsViT's linear
    probe; with one block, the image feature); `mean`, the average of the last stage's normed
    patch features; `mil`, the same weighted by the MIL attention, and `lcr`, by LCR's predicted
    map, so that the three differ in the weights alone (method.md). They always take one block.
    avgpool_patchtokens: see Backbone.last_blocks; not where the image feature is that average
    already. Raises InputError for a pooling that the network lacks.
    """

    source: Source
    pooling: str = "default"
    blocks: int = 1
    avgpool_patchtokens: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in self.source.poolings():
            raise InputError(
                f"EVAL.POOLING {NEEDS[self.pooling]} of this project have; "
                f"{self.source.weights.path} has none. Use default or mean."
            )
        if self.pooling != "default":
            self.blocks, self.avgpool_patchtokens = 1, False
        if self.avgpool_patchtokens and self.source.network.backbone.mean_of_patches:
            self.avgpool_patchtokens = False

    @torch.no_grad()
    def parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """The features before they are concatenated, one [B, D_i] for each block."""
        network = self.source.network
        if self.pooling == "default":
            try:
                return network.backbone.last_blocks(images, self.blocks, self.avgpool_patchtokens)
            except ValueError as error:
                raise InputError(
                    f"LINEAR.N_LAST_BLOCKS (--n_last_blocks) or EVAL.SIZE: {error}."
                ) from None
        patches = network.backbone(images)[1]
        if self.pooling == "mean":
            return (patches.float().mean(dim=1),)
        weights = attention.over_patches(network, patches, self.pooling)
        return ((weights[..., None] * patches.float()).sum(dim=1),)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([part.float() for part in self.parts(images)], dim=1)

    def widths(self, size: int) -> list[int]:
        """D_i of each part, for images of `size` pixels; raises InputError if they cannot be."""
        device = next(self.source.network.parameters()).device
        return [part.shape[1] for part in self.parts(torch.zeros(1, 3, size, size, device=device))]


@dataclass(frozen=True)
class Reading:
    """How labelled images reach a frozen network.

    size, resize: pixels, see eval_transform. precision: fp32, bf16 or fp16. batch, workers: of
    each process. max_bad: the share of images that may be unreadable; they are left out.
    """

    world: World
    size: int
    resize: int
    precision: str = "fp32"
    batch: int = 64
    workers: int = 0
    max_bad: float = 0.0
    normalisation: Normalisation = IMAGENET

    @classmethod
    def of(cls, cfg: Node, world: World, source: Source | None) -> "Reading":
        """By EVAL.* and DATA.*, at the size of the source's run unless EVAL.SIZE says another."""
        size = image_size(source, cfg.EVAL.SIZE) if source is not None else 0
        resize = cfg.EVAL.RESIZE or default_resize(size)
        if size and resize < size:
            raise InputError(
                f"EVAL.RESIZE {resize} is less than the centre crop of {size} pixels (EVAL.SIZE)."
            )
        return cls(
            world,
            size,
            resize,
            precision_of(cfg, world.device, "EVAL.PRECISION"),
            cfg.EVAL.BATCH_SIZE_PER_GPU,
            usable_workers(cfg.DATA.WORKERS),
            cfg.DATA.MAX_BAD,
            normalisation(cfg) if cfg.DATA.MEAN or source is None else source.normalisation,
        )

    def cast(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same function of images on the device, in `precision`."""

        def in_precision(images: Tensor) -> Tensor:
            with autocast(self.precision, self.world.device):
                return function(images)

        return in_precision

    def extract(self, function: Callable[[Tensor], Tensor], images: LabelledImages) -> "Extracted":
        """`function` over the images' centre crops [b, 3, S, S], in `precision` and in order.

        See `extract_values`.
        """
        transform = eval_transform(self.size, self.resize, self.normalisation)
        dataset = KeyedDataset(len(images), 0, partial(_transformed, images, transform))
        values, places, bad = extract_values(
            self.cast(function), dataset, self.world, self.batch, self.workers, self.max_bad
        )
        return Extracted(values, images.labels[places], places, bad)


@dataclass(frozen=True)
class Extracted:
    """What `Reading.extract` gives, the same on every process, on the CPU.

    values [n, ...] float32; labels [n] int64; places: int64 [n], the images' indices in the data
    set, rising; bad: the images that could not be read and are in none of the others.
    """

    values: Tensor
    labels: Tensor
    places: Tensor
    bad: list[BadImage]


@torch.inference_mode()
def extract_values(
    function: Callable[[Tensor], Tensor],
    dataset: KeyedDataset,
    world: World,
    batch: int,
    workers: int,
    max_bad: float,
) -> tuple[Tensor, Tensor, list[BadImage]]:
    """`function` over what a data set gives of each image, in order: values, places and bad images,
    as in Extracted.

    function: a batch [b, ...] on the device -> a tensor [b, ...]. Batches are dealt to the
    processes whole, so what comes out does not depend on their number. Images that cannot be read
    are left out; more than the share `max_bad` of all is an InputError that names the first.
    """
    count = len(dataset)
    mine = distributed.share(-(-count // batch), world)
    keys = ([(0, i) for i in range(n * batch, min((n + 1) * batch, count))] for n in mine)
    outputs, places = [], []
    bad: list[BadImage] = []
    loader = build_loader(dataset, keys, workers, pin_memory=world.device.type == "cuda")
    for loaded in progress(loader, "batches of features", len(mine)):
        bad += loaded.bad
        if len(bad) > max_bad * count:
            break
        if loaded.data is not None:
            data = loaded.data.to(world.device, non_blocking=True)
            outputs.append(function(data).float().cpu())
            places.append(loaded.indices)
    bad = [image for theirs in distributed.gather_objects(bad) for image in theirs]
    check_bad(bad, count, max_bad)
    return distributed.gather_rows(outputs), distributed.gather_rows(places), bad


def _transformed(
    images: LabelledImages, transform: Callable[[Image.Image], Tensor], index: int, _: int
) -> Tensor:
    return transform(images.load(index))


def check_bad(bad: Collection[BadImage | str], images: int, share: float) -> None:
    """Raise InputError where more than `share` of `images` (or all of them) are bad.

    bad: those of all processes, for all of them must raise it together.
    """
    if len(bad) <= share * images and len(bad) < images:
        return
    if share == 0:
        raise InputError(str(next(iter(bad))))
    raise InputError(
        f"{len(bad)} of {images} images cannot be read, more than DATA.MAX_BAD {share:g} allows; "
        f"for instance: {next(iter(bad))}"
        + (" (or raise DATA.MAX_BAD)." if len(bad) < images else ".")
    )


def gallery_and_queries(gallery: str | Path, queries: str | Path) -> Splits:
    """Two folders with class subfolders; the gallery is `train`, the queries are `test`.

    All processes together: the first one lists the files.

    Raises InputError where a folder has no classes, or the queries have one that the gallery
    lacks.
    """
    splits = distributed.on_main(lambda: paired_folders("gallery and queries", gallery, queries))
    if splits.train.root.resolve() == splits.test.root.resolve():
        splits.notes.append(
            f"gallery and queries are the same folder, {queries}: each image votes for itself, so "
            f"the figures are too good"
        )
    return splits
