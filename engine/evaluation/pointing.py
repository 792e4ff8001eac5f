"""Does a map point at the part that decides the class? A measure with its zeros.

Pointing accuracy: the share of images whose most attended patch touches the part's box.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from datasets import synthetic
from engine.evaluation import attention
from engine.evaluation.feature_cache import Found, SplitFeatures
from utils.errors import InputError

Box = Sequence[float]  # x0, y0, x1, y1 in pixels; x1, y1 exclusive


def cells_touching(boxes: Sequence[Box], grid: tuple[int, int], cell: float) -> Tensor:
    """Which square cells of `cell` pixels, in a `grid` of (rows, columns), touch each box.

    The last cells may reach beyond the image. Returns bool [n, rows * columns], row-major
    like patch features.
    """
    rows, columns = grid
    x0, y0, x1, y1 = torch.tensor(boxes, dtype=torch.float64).T[:, :, None]
    left = torch.arange(columns, dtype=torch.float64) * cell
    top = torch.arange(rows, dtype=torch.float64) * cell
    across = (left < x1) & (left + cell > x0)  # [n, columns]
    down = (top < y1) & (top + cell > y0)  # [n, rows]
    return (down[:, :, None] & across[:, None, :]).flatten(1)


def figures(maps: Tensor, touching: Tensor) -> dict[str, float]:
    """Pointing accuracy beside its zeros, and the attention on the part, percent.

    maps [n, N], rows that sum to 1; touching bool [n, N]: the cells that touch the box. accuracy:
    of images whose strongest cell touches it, of equals a random one, so that an even map, such as
    an untrained pooling's, scores chance. chance: what a random cell would score. best_fixed_cell:
    what always naming the one best cell would. mass_on_part: the attention on cells that touch.
    """
    strongest, touching = (maps == maps.amax(1, keepdim=True)).double(), touching.double()
    return {
        "accuracy": 100 * ((strongest * touching).sum(1) / strongest.sum(1)).mean().item(),
        "chance": 100 * touching.mean().item(),
        "best_fixed_cell": 100 * touching.mean(0).max().item(),
        "mass_on_part": 100 * (maps.double() * touching).sum(1).mean().item(),
    }


@dataclass(frozen=True)
class Pointing:
    """Where the network's maps look on the test images, whose parts' boxes must be known.

    The images are seen whole, at reading.size in float32, and all must be readable. kinds: of
    attention.NAMES; () for all that the network has. The figures of each are those of
    `figures`.
    """

    kinds: tuple[str, ...] = ()

    def measure(self, features: SplitFeatures) -> Found:
        network, reading = features.source.network, features.reading
        images = features.images("test")
        boxes, box_size = part_boxes([images.root / path for path in images.paths])
        if not boxes:
            raise InputError(f"{images.root} is not of a set that knows its parts' boxes.")
        kinds = self.kinds or attention.kinds(network)
        grid = network.backbone.patch_grid(reading.size, reading.size)
        cell = network.backbone.stride * box_size / reading.size
        touching = cells_touching(boxes, grid, cell)

        def look(batch: Tensor) -> Tensor:
            return torch.stack([attention.attention_map(network, batch, k) for k in kinds], dim=1)

        whole = replace(reading, resize=reading.size, precision="fp32", max_bad=0.0)
        found = whole.extract(look, images).values
        return Found({kind: figures(found[:, i], touching) for i, kind in enumerate(kinds)})


def part_boxes(paths: Sequence[Path]) -> tuple[list[Box], int]:
    """Boxes of image files in a folder made by datasets.synthetic, and the pixels of its images.

    ([], 0) where the files lie in no such folder. Raises InputError where it does not list all.
    """
    folders = paths[0].resolve().parents[:3]  # class, split, set
    root = next((folder for folder in folders if (folder / synthetic.PARTS_FILE).is_file()), None)
    if root is None:
        return [], 0
    known, boxes = synthetic.read_parts(root), []
    for path in paths:
        path = path.resolve()
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        if name not in known:
            raise InputError(
                f"{root / synthetic.PARTS_FILE} does not list {path}: write the set again, or show "
                f"its images alone."
            )
        boxes.append(known[name])
    return boxes, synthetic.read_size(root)
