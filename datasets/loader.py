"""Which images each process sees at each step, and the loader that brings their crops."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from datasets.folder import UnreadableImage, unreadable_sentence
from datasets.multicrop import MultiCrop, sample_seed
from utils.errors import InputError
from utils.seeding import ORDER, derive_seed

Key = tuple[int, int]  # (epoch, index of the image)
Sample = tuple[list[Tensor], int]
Batch = tuple[list[Tensor], Tensor]


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

    Yields `accumulation` lists of `batch` keys (epoch, index) for each step. Every epoch
    is a permutation drawn from (seed, epoch); step s takes the next
    batch * world * accumulation entries of it, of which each rank has a contiguous share.
    So a step's images depend only on that product, and a run that starts at any step gives
    the tail of the whole run. (Ours.)
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
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(length, batch, world, accumulation)
        self.length, self.batch, self.accumulation, self.seed = length, batch, accumulation, seed
        self.rank, self.world = rank, world
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.batch * self.accumulation
        current, order = -1, []
        for step in self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, order = epoch, self._order(epoch)
            start = (place * self.world + self.rank) * share
            for first in range(start, start + share, self.batch):
                yield [(epoch, index) for index in order[first : first + self.batch]]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
        return torch.randperm(self.length, generator=generator).tolist()


@dataclass(frozen=True)
class BadImage:
    """Stands in for a sample or a batch whose image could not be decoded.

    A marker, because an exception that leaves a worker process carries its traceback in
    its message. `str()` of it is the sentence for the user.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return unreadable_sentence(self.path, self.reason)


class MultiCropDataset(Dataset):
    """The crops of image `index` in epoch `epoch`, for the key (epoch, index).

    `dataset[index]` is (PIL image, label). An item is (list of V float32 [3, S, S], index),
    the same for the same (seed, epoch, index) in any process, or a `BadImage`.
    """

    def __init__(self, dataset: Dataset, multicrop: MultiCrop, seed: int) -> None:
        self.dataset, self.multicrop, self.seed = dataset, multicrop, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Sample | BadImage:
        epoch, index = key
        try:
            image, _ = self.dataset[index]
        except UnreadableImage as error:
            return BadImage(error.path, error.reason)
        return self.multicrop(image, sample_seed(self.seed, epoch, index)), index


class GuardedDataset(Dataset):
    """`dataset` with a `BadImage` in place of an item that cannot be decoded."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int] | BadImage:
        try:
            return self.dataset[index]
        except UnreadableImage as error:
            return BadImage(error.path, error.reason)


def collate(samples: list[Sample | BadImage]) -> Batch | BadImage:
    """B samples (data, number) -> (data batched, int64 [B]), or the first `BadImage`.

    In pretraining the data are a list of V float32 [B, 3, S, S] and the numbers are indices; in
    an evaluation the data are images and the numbers are labels.
    """
    for sample in samples:
        if isinstance(sample, BadImage):
            return sample
    data, numbers = default_collate(samples)
    return data, numbers


def build_loader(
    dataset: Dataset, sampler: StepSampler, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """A loader of `collate`'s batches for the whole run of `sampler`.

    One pass over it is the run, so worker processes start once. `workers` 0 loads in the
    calling process. Each worker uses one torch thread.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        # The loader draws a seed for its workers, by default from the global generator.
        generator=torch.Generator(),
    )
