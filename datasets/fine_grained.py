"""The registry of data sets."""

import difflib
from pathlib import Path

from torchvision.datasets import FGVCAircraft, Flowers102, OxfordIIITPet

from datasets import parsers
from datasets.benchmarks import Benchmark, Counts, Layout
from datasets.folder import ImageFolder, LabelledImages
from datasets.shards import ImageShards, find_shards, read_indices
from datasets.splits import Splits, folder_splits
from utils import distributed
from utils.errors import InputError
from utils.logging import logger

_DOWNLOAD = "DATA.DOWNLOAD true downloads it"
_ONE_FILE_EACH = Layout(
    parsers.read_listed_images,
    ("images", "images.txt", "train_test_split.txt"),
    ("image_class_labels.txt", "classes.txt"),
)

# A new data set is one function (places of its pieces) -> Listing, and one entry.
# What is no benchmark has no official splits.
DATASETS: dict[str, Benchmark | type[ImageFolder] | type[ImageShards]] = {
    "folder": ImageFolder,
    "imagenet1k": ImageFolder,  # EsViT's name for a folder with class subfolders
    "shards": ImageShards,
    "cub": Benchmark(
        "CUB_200_2011",
        (_ONE_FILE_EACH,),
        Counts(200, 5994, 5794),
        "Download it from https://www.vision.caltech.edu/datasets/cub_200_2011",
    ),
    "cars": Benchmark(
        "stanford_cars",
        (
            Layout(
                parsers.read_cars,
                ("cars_train",),
                (
                    "cars_test",
                    "cars_meta.mat",
                    "cars_train_annos.mat",
                    "cars_test_annos_withlabels*.mat",
                ),
            ),
            Layout(parsers.read_cars_in_one_folder, ("car_ims", "cars_annos.mat"), ()),
        ),
        Counts(196, 8144, 8041),
        "Its official address is gone: use a copy",
    ),
    "aircraft": Benchmark(
        "fgvc-aircraft-2013b",
        (
            Layout(
                parsers.read_aircraft,
                ("images", "images_variant_trainval.txt"),
                ("images_variant_test.txt", "variants.txt"),
            ),
        ),
        Counts(100, 6667, 3333),
        _DOWNLOAD,
        FGVCAircraft,
    ),
    "nabirds": Benchmark(
        "nabirds",
        (_ONE_FILE_EACH,),
        Counts(555, 23929, 24633),
        "Download it from https://dl.allaboutbirds.org/nabirds",
    ),
    "flowers": Benchmark(
        "flowers-102",
        (Layout(parsers.read_flowers, ("jpg", "setid.mat"), ("imagelabels.mat",)),),
        Counts(102, 2040, 6149),
        _DOWNLOAD,
        Flowers102,
    ),
    "pets": Benchmark(
        "oxford-iiit-pet",
        (Layout(parsers.read_pets, ("images", "trainval.txt"), ("test.txt",)),),
        Counts(37, 3680, 3669),
        _DOWNLOAD,
        OxfordIIITPet,
    ),
}


def build_dataset(
    name: str, root: str | Path, partial: bool = False
) -> LabelledImages | ImageShards:
    """The images to pretrain on: a benchmark's training split, or all in a folder or in shards.

    All processes together: the first one lists the files (of shards, each reads the indices). Of a
    benchmark its test images and labels are not needed, and no labels are given.
    root: for shards, the folder that holds them or a brace pattern of their names. For `partial`
    and errors see `load_splits`.
    """
    source = _registered(name)
    if source is ImageShards:
        return ImageShards(root)
    if source is ImageFolder:
        return distributed.on_main(lambda: ImageFolder(root))
    splits = distributed.on_main(lambda: source.splits(name, root, partial, evaluated=False))
    for note in splits.notes:
        logger.warning(note)
    return splits.train


def load_splits(name: str, root: str | Path, partial: bool = False) -> Splits:
    """The training and test split of the data set registered as `name`, without a transform.

    All processes together: the first one lists the files.

    root: for a benchmark, its official folder or the folder that holds that; for a folder of
    images, the folder that holds train and val (or test). partial: a note, not an error, where
    listed images are missing (they are left out) or the numbers of images or classes are not
    the official ones.

    Raises `InputError`.
    """
    source = _registered(name)
    if isinstance(source, Benchmark):
        return distributed.on_main(lambda: source.splits(name, root, partial))
    if source is ImageShards:
        raise InputError(
            f"the data set '{name}' is for pretraining and has no splits: evaluate on a folder of "
            "images or a benchmark"
        )
    return distributed.on_main(lambda: folder_splits(name, root))


def prepare(name: str, root: str | Path, fetch: bool = False) -> None:
    """Download a benchmark if `fetch` says so, and index shards that have no index.

    All processes together: the first one works, the others wait. Raises `InputError` on all.
    """
    source = DATASETS.get(name)
    if fetch and isinstance(source, Benchmark):
        distributed.on_main(lambda: source.download(name, root))
    if distributed.size() > 1 and source is ImageShards:
        distributed.on_main(lambda: len(read_indices(find_shards(root))))


def _registered(name: str) -> Benchmark | type[ImageFolder] | type[ImageShards]:
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"there is no data set '{name}'{hint}: use one of {', '.join(sorted(DATASETS))}"
        )
    return DATASETS[name]
