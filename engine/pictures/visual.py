"""What visualize.py looks at: networks of several files, and a few images with their parts."""

import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from datasets import synthetic
from datasets.folder import ImageFolder, LabelledImages, load_image
from datasets.multicrop import eval_transform
from engine.evaluation import attention, pointing
from engine.evaluation.features import Extracted, extract
from engine.evaluation.source import Source, image_size, load_source
from engine.pictures.pictures import stratified_subset
from models.network import Network
from utils.distributed import World
from utils.errors import InputError

BATCH = 32  # images in one forward
MOST_SUBJECTS = len(string.ascii_uppercase)


@dataclass(frozen=True)
class Subject:
    """A network that is looked at. letter: how pictures call it. kinds: its maps."""

    letter: str
    source: Source

    @property
    def network(self) -> Network:
        return self.source.network

    @property
    def kinds(self) -> list[str]:
        return attention.kinds(self.network)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def described(self) -> dict:
        """What it is, as plain data."""
        weights = self.source.weights
        return {
            "letter": self.letter,
            "path": weights.path,
            "sha256": weights.sha256,
            "key": weights.key,
            "architecture": weights.arch,
            "epochs": weights.epoch,
            "maps": self.kinds,
        }

    def cell(self, size: int) -> float:
        """A patch's side as a share of the side of a view of `size` pixels."""
        return self.network.backbone.stride / size


def subjects(paths: list[str], key: str, device: torch.device) -> list[Subject]:
    """The networks of files of weights, ours or others'; InputError for what cannot be read."""
    if len(paths) > MOST_SUBJECTS:
        raise InputError(f"--checkpoint has {len(paths)} files: give at most {MOST_SUBJECTS}.")
    sources = [load_source(path, key) for path in paths]
    for source in sources:
        source.network.to(device)
    return [Subject(*pair) for pair in zip(string.ascii_uppercase, sources, strict=False)]


def common_size(found: list[Subject], size: int | None) -> tuple[int, int]:
    """Pixels of a whole image, and the multiple of pixels that each view's side must be.

    size: as asked for, or None for that of the first network's own run, else 224.
    Raises InputError where a network cannot take it.
    """
    size = size or image_size(found[0].source)
    for subject in found:
        multiple = subject.network.backbone.patch_size
        if size % multiple:
            raise InputError(
                f"--size {size} must be a multiple of {multiple}, the patch size of "
                f"{subject.source.weights.path}."
            )
    return size, math.lcm(*(subject.network.backbone.patch_size for subject in found))


@dataclass(frozen=True)
class ShownImages:
    """The images that are shown, each as its centre square.

    names: relative to their folder. boxes: the parts', one an image, in pixels of images of
    box_size; none and 0 where nobody knows them. folder: all images of the folder that they
    are from, None where files were named.
    """

    names: list[str]
    squares: list[Image.Image]
    boxes: list[pointing.Box]
    box_size: int
    folder: LabelledImages | None

    def box(self, index: int) -> list[float] | None:
        """The part's box in pixels of the square, where it is known."""
        if not self.boxes:
            return None
        scale = self.squares[index].width / self.box_size
        return [scale * edge for edge in self.boxes[index]]

    def batch(self, size: int) -> Tensor:
        """What networks are shown: [n, 3, size, size], normalised."""
        transform = eval_transform(size, size)
        return torch.stack([transform(square) for square in self.squares])


def open_images(given: list[Path], count: int) -> ShownImages:
    """`count` images spread evenly over a folder, or over the files that are named.

    Of a folder that datasets.synthetic made the validation images are taken. Raises InputError
    where there are none or one that would be shown cannot be read.
    """
    folder = None
    if len(given) == 1 and not given[0].is_file():
        root = given[0]
        if (root / synthetic.PARTS_FILE).is_file() and (root / "val").is_dir():
            root = root / "val"
        folder = ImageFolder(root)
        paths, names = [folder.root / path for path in folder.paths], folder.paths
    else:
        if folders := [path for path in given if path.is_dir()]:
            raise InputError(
                f"--images names the folder {folders[0]} beside others: give one folder, or files."
            )
        paths, names = given, [path.name for path in given]
    places = torch.linspace(0, len(paths) - 1, min(count, len(paths)), dtype=torch.float64)
    chosen = places.round().long().tolist()
    squares = []
    for index in chosen:
        image = load_image(paths[index])
        squares.append(center_crop(image, min(image.size)))
    boxes, box_size = pointing.part_boxes([paths[index] for index in chosen])
    return ShownImages([names[index] for index in chosen], squares, boxes, box_size, folder)


def whole_maps(found: list[Subject], images: Tensor) -> dict[str, dict[str, Tensor]]:
    """Maps [n, N] of images [n, 3, S, S], on the CPU: kind -> letter of who has it -> maps."""
    maps: dict[str, dict[str, Tensor]] = {kind: {} for kind in attention.NAMES}
    for subject in found:
        for kind in subject.kinds:
            map_of = partial(attention.attention_map, subject.network, kind=kind)
            maps[kind][subject.letter] = _in_batches(map_of, images, subject.device)
    return {kind: of_kind for kind, of_kind in maps.items() if of_kind}


def whole_heads(found: list[Subject], images: Tensor) -> dict[str, Tensor]:
    """Each head's map [n, heads, N] on the CPU: letter -> maps, of the ViTs."""
    return {
        subject.letter: _in_batches(
            partial(attention.head_maps, subject.network), images, subject.device
        )
        for subject in found
        if "self" in subject.kinds
    }


def _in_batches(
    function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device
) -> Tensor:
    """function(images), BATCH of them at a time on the device; the results on the CPU."""
    return torch.cat([function(part.to(device)).cpu() for part in images.split(BATCH)])


def image_features(
    found: list[Subject], images: ShownImages, size: int, most: int, seed: int, world: World
) -> dict[str, Extracted]:
    """Image features of at most `most` images of a folder with classes; letter -> features.

    {} where there are no classes or `most` is 0. InputError where an image cannot be read.
    """
    folder = images.folder
    if folder is None or not folder.classes or not most:
        return {}
    chosen = stratified_subset(torch.tensor(folder.labels), most, seed).tolist()
    shown = folder.subset(chosen).through(eval_transform(size, size))
    return {
        subject.letter: extract(partial(_image_feature, subject.network), shown, world)
        for subject in found
    }


def _image_feature(network: Network, images: Tensor) -> Tensor:
    return network.backbone(images)[0]


def pointing_rows(
    found: list[Subject], maps: dict[str, dict[str, Tensor]], images: ShownImages, size: int
) -> list[dict]:
    """Pointing of each map of each network over the images shown, percent; [] without boxes."""
    rows = []
    for subject in found if images.boxes else []:
        grid = subject.network.backbone.patch_grid(size, size)
        cell = subject.cell(size) * images.box_size
        touching = pointing.cells_touching(images.boxes, grid, cell)
        rows += [
            {
                "checkpoint": subject.letter,
                "map": kind,
                "images": len(images.boxes),
                "accuracy": pointing.pointing(maps[kind][subject.letter], touching),
                "chance": pointing.chance(touching),
                "best_fixed_cell": pointing.best_fixed_cell(touching),
                "mass_on_part": pointing.mass_on_part(maps[kind][subject.letter], touching),
            }
            for kind in subject.kinds
        ]
    return rows
