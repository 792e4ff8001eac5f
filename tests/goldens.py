"""The golden figures: where they lie, how their inputs are made, what parity means."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(os.environ.get("CMD_GOLDENS", Path(__file__).parent / "goldens"))


def _recipe():
    spec = importlib.util.spec_from_file_location("golden_recipe", FOLDER / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = _recipe()
OFFSET = json.loads((FOLDER / "meta.json").read_text())["seed_offset"]


def read_json(name: str):
    return json.loads((FOLDER / name).read_text())


def read_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name) as file:
        return dict(file)


def array(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(recipe.array(seed + OFFSET, *shape))


def labels(seed: int, n: int, classes: int) -> torch.Tensor:
    return torch.from_numpy(recipe.labels(seed + OFFSET, n, classes))


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(recipe.weight(name, tuple(shape))) for name, shape in shapes.items()
    }


def assert_parity(ours, golden: np.ndarray, name: str) -> None:
    """max |ours - golden| <= 1e-5 * max |golden|."""
    ours = np.asarray(ours.detach() if isinstance(ours, torch.Tensor) else ours, dtype=np.float64)
    assert ours.shape == golden.shape, f"{name}: shape {ours.shape}, golden {golden.shape}"
    limit = 1e-5 * np.abs(golden).max()
    difference = np.abs(ours - golden).max()
    assert difference <= limit, f"{name}: differs by {difference:.3g}, limit {limit:.3g}"
