"""Which images each process sees at each step, and the loader that brings them or their crops."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from datasets.ahead import Wait
from datasets.folder import BadImage, StoredImages, UnreadableImage
from datasets.multicrop import sample_seed
from utils.distributed import World, share
from utils.errors import InputError
from utils.logging import progress
from utils.seeding import ORDER, derive_seed
from utils.signals import end_if_orphaned, outlive_signals

Key = tuple[int, int]  # (epoch, index of the image)
_INDICES_AT_ONCE = 16  # that a worker of `for_each` is handed


def steps_per_epoch(length: int, batch: int, world: int, accumulation: int) -> int:
    """Optimizer steps in one epoch of `length` images; the incomplete last one is dropped.

    One step takes batch * world * accumulation images. Raises `InputError` if the data set
    holds fewer.
    """
    images = batch * world * accumulation
    if length < images:
        raise InputError(
            f"the data set has {length} images but one step takes {images} (batch {batch} x "
            f"{world} processes x {accumulation} accumulated): lower the batch size or give "
            "more images"
        )
    return length // images


class StepSampler(Sampler[list[Key]]):
    """Micro-batches of one process for optimizer steps first_step to last_step - 1 of a run.

    Yields `accumulation` lists of `batch` keys (epoch, index) for each step. Every epoch is a
    permutation, order(epoch), by default `epoch_order`'s; a step takes the next
    batch * world * accumulation entries of it, of which each rank has a contiguous share. (Ours.)
    """

    def __init__(
        self,
        length: int,
        batch: int,
        rank: int,
        world: int,
        accumulation: int,
        seed: int,
        first_step: int,
        last_step: int,
        order: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(length, batch, world, accumulation)
        self.batch, self.accumulation = batch, accumulation
        self.rank, self.world = rank, world
        self.order = order or partial(epoch_order, length, seed)
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.batch * self.accumulation
        current, order = -1, torch.empty(0)
        for step in self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, order = epoch, self.order(epoch)
            start = (place * self.world + self.rank) * share
            for first in range(start, start + share, self.batch):
                yield [(epoch, index) for index in order[first : first + self.batch].tolist()]


class EpochSampler(Sampler[list[Key]]):
    """Batches of one process for epochs first_epoch to last_epoch - 1 of a linear probe.

    Every epoch is a permutation of `indices` drawn from (seed, epoch), cut into batches of `batch`
    images over all processes, of which each has a contiguous share. The last batch of an epoch is
    what is left; a process's share of it may be an empty list. (Ours.)
    """

    def __init__(
        self,
        indices: Sequence[int] | Tensor,
        batch: int,
        world: World,
        seed: int,
        first_epoch: int,
        last_epoch: int,
    ) -> None:
        self.indices = torch.as_tensor(indices)
        self.batch, self.world, self.seed = batch, world, seed
        self.epochs = range(first_epoch, last_epoch)

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __len__(self) -> int:
        return len(self.epochs) * self.batches_per_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch in self.epochs:
            order = epoch_order(len(self.indices), self.seed, epoch)
            for first in range(0, len(order), self.batch):
                batch = order[first : first + self.batch]
                mine = batch[list(share(len(batch), self.world))]
                yield [(epoch, index) for index in self.indices[mine].tolist()]


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """The permutation of 0 .. length - 1 in which an epoch visits the images, int64."""
    generator = torch.Generator().manual_seed(derive_seed(seed, ORDER, epoch))
    return torch.randperm(length, generator=generator)


class Batch(NamedTuple):
    """What a loader brings: `data` batched (None where no image was read), their `indices`.

    In pretraining `data` is the crops, a list of V uint8 [B, 3, S, S], or what they are made of: of
    decoded images (pixels, sizes, draws), the first two as `pad` gives them; of images that are
    kept their draws alone, float32 [B, V, D]. A feed makes of it the crops on the device, V float32
    [B, 3, S, S], and says how long the device has `waited`. Elsewhere it is float32 [B, 3, S, S].
    indices: int64 [B]. bad: in pretraining others take their places (datasets/substitutes.py),
    elsewhere they are left out.
    """

    data: Any
    indices: Tensor
    bad: list[BadImage]
    waited: Wait | None = None


class KeyedDataset(Dataset):
    """Samples by keys (epoch, index), each the same for the same seed and key in any process.

    make(index, seed): what image `index` gives by the random numbers of `seed`. It goes to the
    loader's processes, which may want it pickled. An item is (data, index), or a `BadImage`
    where `make` raises `UnreadableImage`.
    """

    def __init__(self, length: int, seed: int, make: Callable[[int, int], Any]) -> None:
        self.length, self.seed, self.make = length, seed, make

    def __len__(self) -> int:
        """Number of images."""
        return self.length

    def __getitem__(self, key: Key) -> tuple[Any, int] | BadImage:
        return self.sample(key, key[1])

    def sample(self, key: Key, index: int) -> tuple[Any, int] | BadImage:
        """Image `index` by the random numbers of `key`."""
        try:
            return self.make(index, sample_seed(self.seed, *key)), index
        except UnreadableImage as error:
            return error.bad


def augmented(
    images: StoredImages, augment: Callable[[Image.Image, int], Any], seed: int
) -> KeyedDataset:
    """augment(image, seed) of every image, such as MultiCrop's list of crops."""
    return KeyedDataset(len(images), seed, partial(_augmented, images, augment))


def _augmented(
    images: StoredImages, augment: Callable[[Image.Image, int], Any], index: int, seed: int
) -> Any:
    return augment(images.load(index), seed)


def decode(images: StoredImages, index: int, shorter_side: int) -> Tensor:
    """Image `index` by `load_image`: uint8 [h, w, 3]; raises `UnreadableImage`."""
    return torch.from_numpy(np.array(images.load(index, shorter_side)))


def pad(images: Sequence[Tensor], pinned: bool = False) -> tuple[Tensor, Tensor]:
    """Images uint8 [h, w, 3] on the CPU -> pixels uint8 [B, H, W, 3] and sizes int64 [B, 2].

    Each image is in the top left corner, beyond it is anything; sizes are (height, width).
    """
    sizes = torch.tensor([image.shape[:2] for image in images])
    height, width = sizes.amax(0).tolist()
    pixels = torch.empty(len(images), height, width, 3, dtype=torch.uint8, pin_memory=pinned)
    for place, image in zip(pixels, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return pixels, sizes


def collate(samples: list[tuple[Any, int] | BadImage]) -> Batch:
    """The samples that were read as one batch, and the others beside it."""
    bad = [sample for sample in samples if isinstance(sample, BadImage)]
    if len(bad) == len(samples):
        return Batch(None, torch.empty(0, dtype=torch.int64), bad)
    good = [sample for sample in samples if not isinstance(sample, BadImage)]
    if not isinstance(good[0][0], tuple):
        return Batch(*default_collate(good), bad)
    decoded, indices = zip(*good, strict=True)
    images, draws = zip(*decoded, strict=True)
    return Batch((*pad(images), torch.stack(draws)), torch.tensor(indices), bad)


def usable_workers(wanted: int) -> int:
    """Loader processes: `wanted`, at most the cores at hand, as more would only cost memory."""
    if hasattr(os, "sched_getaffinity"):
        return min(wanted, len(os.sched_getaffinity(0)))
    return min(wanted, os.cpu_count() or 1)


def build_loader(
    dataset: Dataset, sampler: Iterable[list], workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """A loader of a `Batch` for each list of keys that `sampler` yields.

    One pass over it is the whole run, so worker processes start once; they outlive the signals that
    stop a run. `workers` 0 loads in the calling process.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=outlive_signals,
        # The loader draws a seed for its workers, by default from the global generator.
        generator=torch.Generator(),
    )


def _each(function: Callable[[Any], Any], items: list) -> list:
    return [function(item) for item in items]


def for_each(function: Callable[[Any], Any], indices: Sequence, workers: int, what: str) -> list:
    """function(i) for the indices in order, by loader workers, with progress: `what` is done.

    A worker is started for every _INDICES_AT_ONCE indices at most.
    """
    loader = DataLoader(
        indices,
        batch_size=_INDICES_AT_ONCE,
        num_workers=min(workers, len(indices) // _INDICES_AT_ONCE),
        collate_fn=partial(_each, function),  # in the loader's processes
        worker_init_fn=end_if_orphaned,
        generator=torch.Generator(),  # the global one is left alone
    )
    return list(progress((item for batch in loader for item in batch), what, len(indices)))
