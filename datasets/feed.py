"""How images become crops: made by the loader's processes, or on the device of a whole batch.

A feed has a data set for the loader to read, by keys (epoch, image), and turns what the loader
brings into crops on the device; engine/build.py chooses one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from datasets.ahead import Wait, now, transferred
from datasets.batched import BatchedMultiCrop, Images
from datasets.cache import DecodedImages, channels_first
from datasets.folder import BadImage, StoredImages, UnreadableImage
from datasets.loader import Batch, KeyedDataset, StepSampler, augmented, build_loader, decode
from datasets.multicrop import Augmentation, MultiCrop, normalised
from datasets.shards import ImageShards, ShardOrder
from datasets.substitutes import FullBatches
from utils.distributed import World
from utils.errors import InputError
from utils.signals import held


class Feed(ABC):
    """The way from stored images to crops.

    dataset: what a loader reads. device: of the crops. bad: what is known to be unreadable before
    the first batch: folders that cannot be listed and, of images that are kept, those that could
    not be decoded. description: who decodes and who crops, for people.
    """

    def __init__(
        self, dataset: KeyedDataset, world: World, bad: Sequence[BadImage], description: str
    ) -> None:
        self.dataset, self.device, self.bad = FullBatches(dataset), world.device, bad
        self.description = description

    @abstractmethod
    def moved(self, batch: Batch) -> Any:
        """What the crops are made of, on the device; `batch.data` is not None.

        Copies are from pinned memory, and the host does not wait for them.
        """

    @abstractmethod
    def crops(self, moved: Any) -> list[Tensor]:
        """The V crops, float32 [B, 3, S, S], on the device."""

    def _move(self, batch: Batch) -> Batch:
        return batch if batch.data is None else batch._replace(data=self.moved(batch))

    def batches(self, sampler: StepSampler, workers: int) -> Iterator[Batch]:
        """Starts `workers` loader processes; crops on the device for each list of keys.

        On a GPU what the crops of the next batch are made of is copied there meanwhile. InputError,
        when it is asked for, where a batch could not be filled.
        """
        device = self.device
        loader = build_loader(self.dataset, sampler, workers, device.type == "cuda")
        with held():  # no stop signal hits a loader process before it is ready for one
            loaded = iter(loader)
        batches = transferred(loaded, self._move, device)

        def take() -> Batch:
            began = now(device)
            batch = next(batches)  # the end of these is the end
            waited = Wait(began, now(device))
            if batch.data is None:
                raise InputError(
                    f"a batch cannot be filled: {len(batch.bad)} images in a row cannot be read, "
                    f"or all that can are in it already; for instance, {batch.bad[0]}, or lower "
                    "TRAIN.BATCH_SIZE_PER_GPU."
                )
            return batch._replace(data=self.crops(batch.data), waited=waited)

        return iter(take, None)


class WorkerCrops(Feed):
    """The loader's processes decode each image and make its crops."""

    def __init__(
        self, images: StoredImages, augmentation: Augmentation, seed: int, world: World
    ) -> None:
        self._normalisation = augmentation.normalisation
        dataset = augmented(images, MultiCrop(augmentation), seed)
        description = "images decoded and cropped by the loader"
        super().__init__(dataset, world, images.unlisted, description)

    def moved(self, batch: Batch) -> list[Tensor]:
        return [crop.to(self.device, non_blocking=True) for crop in batch.data]

    def crops(self, moved: list[Tensor]) -> list[Tensor]:
        return [normalised(crop, self._normalisation) for crop in moved]


class DeviceCrops(Feed):
    """The crops of a batch are made on the device.

    The loader's processes decode its images; where `kept` holds all images decoded, they only
    draw random numbers. shorter_side: pixels to which images are reduced before, 0 for not at all.
    """

    def __init__(
        self,
        images: StoredImages,
        augmentation: Augmentation,
        seed: int,
        world: World,
        shorter_side: int,
        kept: DecodedImages | None = None,
    ) -> None:
        self._multicrop, self.kept = BatchedMultiCrop(augmentation), kept
        draw, bad, place = self._multicrop.draw, [*images.unlisted], "decoded by the loader"
        if kept is None:
            make = partial(_decoded, images, shorter_side, draw)
        else:
            make = partial(_drawn, kept.bad, draw)
            bad, place = [*bad, *kept.bad.values()], kept.place
        size = f"at most {shorter_side} pixels on the shorter side" if shorter_side else "full size"
        description = f"crops made on {world.device} from images of {size}, {place}"
        super().__init__(KeyedDataset(len(images), seed, make), world, bad, description)

    def moved(self, batch: Batch) -> tuple[Images, Tensor]:
        if self.kept is not None:
            return self.kept.batch(batch.indices.tolist()), batch.data
        pixels, sizes, draws = batch.data
        pixels = pixels.to(self.device, non_blocking=True)
        return channels_first(pixels, sizes.tolist()), draws

    def crops(self, moved: tuple[Images, Tensor]) -> list[Tensor]:
        return self._multicrop(*moved)


def _decoded(
    images: StoredImages, shorter_side: int, draw: Callable[[int], Tensor], index: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The image uint8 [h, w, 3] and its crops' draws, float32 [V, D]."""
    return decode(images, index, shorter_side), draw(seed)


def _drawn(
    bad: Mapping[int, BadImage], draw: Callable[[int], Tensor], index: int, seed: int
) -> Tensor:
    """The draws alone, float32 [V, D], of an image that is kept."""
    if index in bad:
        raise UnreadableImage(bad[index].path, bad[index].reason)
    return draw(seed)


def step_sampler(
    images: StoredImages,
    batch: int,
    accumulation: int,
    world: World,
    seed: int,
    first_step: int,
    last_step: int,
) -> StepSampler:
    """The keys of this process's micro-batches, for steps first_step to last_step - 1 of a run.

    Shards have an order of epochs that keeps each process in its own ones.
    """
    order = None
    if isinstance(images, ImageShards):
        order = ShardOrder(images.counts, world.size, batch * accumulation, seed)
    return StepSampler(
        len(images), batch, world.rank, world.size, accumulation, seed, first_step, last_step, order
    )
