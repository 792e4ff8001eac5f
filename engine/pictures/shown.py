"""What visualize.py looks at: networks of several files, and a few images with their parts."""

import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import center_crop

from datasets import synthetic
from datasets.folder import ImageFolder, LabelledImages, load_image
from engine.evaluation import pointing
from engine.evaluation.source import Source, image_size, load_source
from engine.pictures.drawing import evenly
from utils.errors import InputError
from utils.logging import logger

LOCAL_SHARE = 96 / 224  # of a local crop's side in a global one's, the field's


def load_sources(paths: Sequence[str], key: str, device: torch.device) -> dict[str, Source]:
    """The networks of files of weights, ours or others', by the letter that pictures give them.

    Raises InputError for what cannot be read.
    """
    letters = string.ascii_uppercase
    if len(paths) > len(letters):
        raise InputError(f"--checkpoint has {len(paths)} files: give at most {len(letters)}.")
    sources = {letter: load_source(path, key) for letter, path in zip(letters, paths, strict=False)}
    for source in sources.values():
        source.network.to(device)
    return sources


def common_sizes(
    sources: Sequence[Source], size: int | None, has_local: bool = True
) -> tuple[int, int]:
    """Pixels of a whole image, and of a local crop, in multiples that all networks take.

    size: as asked for, or None for that of the first network's own run, else 224. has_local:
    whether there are local crops at all. Raises InputError where a network cannot take either.
    """
    size = size or image_size(sources[0])
    multiple = math.lcm(*(source.network.backbone.patch_size for source in sources))
    local = max(1, round(size * LOCAL_SHARE / multiple)) * multiple
    for source in sources:
        backbone, path = source.network.backbone, source.weights.path
        if misfit := backbone.misfit(size):
            raise InputError(f"--size {size} {misfit} {path}.")
        if has_local and (misfit := backbone.misfit(local)):
            raise InputError(
                f"--size {size}: a local crop of {local} pixels {misfit} {path}; give a larger "
                f"--size, or --local_crops 0."
            )
    return size, local


@dataclass(frozen=True)
class ShownImages:
    """The images that are shown, each as its centre square.

    names: paths relative to their folder. boxes: the parts', one an image, in pixels of the
    squares, which are of one size then; none where nobody knows them.
    """

    names: list[str]
    squares: list[Image.Image]
    boxes: list[pointing.Box]

    def first(self, count: int) -> "ShownImages":
        return ShownImages(self.names[:count], self.squares[:count], self.boxes[:count])


def square(path: Path) -> Image.Image:
    """An image's centre square; InputError where it is unreadable."""
    image = load_image(path)
    return center_crop(image, min(image.size))


def readable_squares(paths: Sequence[Path]) -> Iterator[Image.Image]:
    """As `square`, one at a time; what is unreadable is said and left out."""
    for path in paths:
        try:
            yield square(path)
        except InputError as error:
            logger.warning(f"left out of the maps' figures: {error}")


def show_images(paths: Sequence[Path], names: Sequence[str], count: int) -> ShownImages:
    """At most `count` images, spread evenly over some files; InputError where one is unreadable."""
    chosen = evenly(len(paths), count)
    squares = [square(paths[index]) for index in chosen]
    boxes, _ = pointing.part_boxes([paths[index] for index in chosen])
    return ShownImages([names[index] for index in chosen], squares, boxes)


def find_images(given: Sequence[Path]) -> tuple[list[Path], list[str], LabelledImages | None]:
    """Files of images, their names, and the folder that they are all of; None of named files.

    Of a folder that datasets.synthetic made the validation images are taken. Raises InputError
    where there are none.
    """
    folders = [path for path in given if path.is_dir()]
    if folders and len(given) > 1:
        raise InputError(
            f"--images names the folder {folders[0]} beside others: give one folder, or files."
        )
    root = given[0]
    if len(given) > 1 or root.is_file():
        return list(given), [path.name for path in given], None
    if (root / synthetic.PARTS_FILE).is_file() and (root / "val").is_dir():
        root = root / "val"
    folder = ImageFolder(root)
    return [folder.root / path for path in folder.paths], list(folder.paths), folder
