"""How images become crops: made by the loader's processes, or on the device of a whole batch.

There are three feeds. Each has a data set for the loader to read, by keys (epoch, image), and
`crop`, which turns what the loader brings into crops on the device. `build_feed` chooses one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from torch import Tensor

from datasets.batched import BatchedMultiCrop
from datasets.cache import DecodedImages, channels_first
from datasets.folder import BadImage, StoredImages
from datasets.loader import (
    AugmentedDataset,
    Batch,
    DecodedDataset,
    Draws,
    KeyedDataset,
    StepSampler,
    build_loader,
)
from datasets.multicrop import Augmentation, MultiCrop
from datasets.shards import ImageShards, ShardOrder
from datasets.substitutes import FullBatches, full
from utils.distributed import World
from utils.logging import logger
from utils.signals import held


class Feed(ABC):
    """The way from stored images to crops.

    dataset: what a loader reads. device: of the crops. bad: what is known to be unreadable before
    the first batch: folders that cannot be listed and, of images that are kept, those that could
    not be decoded. description: who decodes and who crops, for people.
    """

    description: str

    def __init__(self, dataset: KeyedDataset, world: World, bad: Sequence[BadImage]) -> None:
        self.dataset, self.device, self.bad = FullBatches(dataset), world.device, bad

    @abstractmethod
    def crops(self, batch: Batch) -> list[Tensor]:
        """The V crops, float32 [B, 3, S, S], on the device; `batch.data` is not None."""

    def crop(self, batch: Batch) -> Batch:
        """The loader's batch with its crops as `data`.

        Raises InputError where no images were found to fill the batch (see `full`).
        """
        return batch._replace(data=self.crops(full(batch)))

    def batches(self, sampler: StepSampler, workers: int) -> Iterator[Batch]:
        """Starts `workers` loader processes; crops on the device for each list of keys.

        The crops of a batch are made when it is asked for, and not held after.
        """
        loader = build_loader(self.dataset, sampler, workers, self.device.type == "cuda")
        with held():  # no stop signal hits a loader process before it is ready for one
            return map(self.crop, loader)


class WorkerCrops(Feed):
    """The loader's processes decode each image and make its crops."""

    description = "images decoded and cropped by the loader"

    def __init__(
        self, images: StoredImages, augmentation: Augmentation, seed: int, world: World
    ) -> None:
        augmented = AugmentedDataset(images, MultiCrop(augmentation), seed)
        super().__init__(augmented, world, images.unlisted)

    def crops(self, batch: Batch) -> list[Tensor]:
        return [crop.to(self.device, non_blocking=True) for crop in batch.data]


class DeviceCrops(Feed):
    """The loader's processes decode the images; their crops are made on the device.

    shorter_side: pixels to which images are reduced before, 0 for not at all.
    """

    def __init__(
        self,
        images: StoredImages,
        augmentation: Augmentation,
        seed: int,
        world: World,
        shorter_side: int,
    ) -> None:
        self._multicrop = BatchedMultiCrop(augmentation)
        decoded = DecodedDataset(images, shorter_side, self._multicrop.draw, seed)
        super().__init__(decoded, world, images.unlisted)
        self.description = f"{_cropped(world, shorter_side)}, decoded by the loader"

    def crops(self, batch: Batch) -> list[Tensor]:
        pixels, sizes, draws = batch.data
        pixels = pixels.to(self.device, non_blocking=True)
        return self._multicrop(channels_first(pixels, sizes.tolist()), draws)


class KeptImages(Feed):
    """All images were decoded once and are kept; their crops are made on the device.

    The loader's processes only draw random numbers.
    """

    def __init__(
        self,
        images: StoredImages,
        augmentation: Augmentation,
        seed: int,
        world: World,
        shorter_side: int,
        kept: DecodedImages,
    ) -> None:
        self._multicrop, self._kept = BatchedMultiCrop(augmentation), kept
        draws = Draws(len(images), self._multicrop.draw, seed, kept.bad)
        super().__init__(draws, world, [*images.unlisted, *kept.bad.values()])
        self.description = f"{_cropped(world, shorter_side)}, {kept.place}"

    def crops(self, batch: Batch) -> list[Tensor]:
        return self._multicrop(self._kept.batch(batch.indices.tolist()), batch.data)


def build_feed(
    images: StoredImages,
    augmentation: Augmentation,
    seed: int,
    world: World,
    crops_on_device: bool = False,
    cache: str = "none",
    shorter_side: int = 0,
    workers: int = 0,
) -> Feed:
    """The feed that DATA.CROPS and DATA.CACHE (none | ram | device) ask for.

    Images that are kept are decoded here, by `workers` loader processes for each process of the
    run; all processes together. Raises InputError, on all of them, where that cannot be.
    """
    if not crops_on_device:
        return WorkerCrops(images, augmentation, seed, world)
    if 0 < shorter_side < augmentation.global_crops_size:
        logger.warning(
            f"DATA.CACHE_SIZE {shorter_side} is below AUG.GLOBAL_CROPS_SIZE "
            f"{augmentation.global_crops_size}: crops are enlarged from images with less detail"
        )
    if cache == "none":
        return DeviceCrops(images, augmentation, seed, world, shorter_side)
    kept = DecodedImages(images, shorter_side, world, workers, on_device=cache == "device")
    return KeptImages(images, augmentation, seed, world, shorter_side, kept)


def _cropped(world: World, shorter_side: int) -> str:
    size = "of full size"
    if shorter_side:
        size = f"of at most {shorter_side} pixels on the shorter side"
    return f"crops made on {world.device} from images {size}"


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
