"""Does a map point at the part that decides the class? A measure with its zeros.

Pointing accuracy: the share of images whose most attended patch touches the part's box.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from datasets import synthetic
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


def pointing(attention: Tensor, touching: Tensor) -> float:
    """Percent of images whose strongest patch touches the box; the first of equals.

    attention [n, N] (any monotone form, such as its logarithm), touching bool [n, N].
    """
    strongest = attention.argmax(dim=1, keepdim=True)
    return 100 * touching.gather(1, strongest).double().mean().item()


def chance(touching: Tensor) -> float:
    """Percent of cells that touch the box: what a random patch would score."""
    return 100 * touching.double().mean().item()


def best_fixed_cell(touching: Tensor) -> float:
    """Percent scored by always naming the one cell that touches most often."""
    return 100 * touching.double().mean(0).max().item()


def mass_on_part(attention: Tensor, touching: Tensor) -> float:
    """Percent of the attention (rows of [n, N] that sum to 1) on cells that touch the box."""
    return 100 * (attention.double() * touching).sum(1).mean().item()


def figures(attention: Tensor, touching: Tensor) -> dict[str, float]:
    """Pointing accuracy and the attention's mass, beside what no learning gives; percent."""
    return {
        "accuracy": pointing(attention, touching),
        "chance": chance(touching),
        "best_fixed_cell": best_fixed_cell(touching),
        "mass_on_part": mass_on_part(attention, touching),
    }


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
