"""What is done of a study: one JSON for each network under OUT/results, and what it is of."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.studies.study import RANDOM, Study
from engine.studies.study_evaluation import attending_shape, network_shape
from utils import config
from utils.config import Node
from utils.errors import InputError
from utils.files import make_folder, write_json
from utils.options import FIGURES, SHAPES, WEIGHTS

_FILE = re.compile(r"(.+)-seed(\d+)\.json")


@dataclass(frozen=True)
class RandomRow:
    """A randomly initialised network: the zero of all cells of one shape on one data set."""

    name: str
    data: str
    shape: dict
    cells: tuple[str, ...]


def random_rows(study: Study) -> list[RandomRow]:
    """One for each shape of network and data set, named by what tells them apart."""
    groups: dict[tuple[str, str], list[str]] = {}
    shapes: dict[tuple[str, str], dict] = {}
    for cell in study.cells.values():
        shape = network_shape(study.config(cell.name))
        key = (cell.data, json.dumps(shape))
        groups.setdefault(key, []).append(cell.name)
        shapes[key] = shape
    rows: list[RandomRow] = []
    for (data, text), cells in groups.items():
        alike = [key for key in groups if key[0] == data]
        parts = [RANDOM] + [data] * (len(study.data) > 1)
        if len(alike) > 1:
            # Several networks on this set: named by the first cell of each.
            parts.append(cells[0])
        rows.append(RandomRow("-".join(parts), data, shapes[data, text], tuple(cells)))
    return rows


def path_of(output: Path, name: str, seed: int) -> Path:
    """The result of a cell, or of a random network, with a seed."""
    return output / "results" / f"{name}-seed{seed}.json"


def written(output: Path) -> Iterator[tuple[str, int]]:
    """(name, seed) of the results that there are, whatever study they are of."""
    for path in sorted((output / "results").glob("*.json")):
        if match := _FILE.fullmatch(path.name):
            yield match[1], int(match[2])


def read(path: Path) -> dict | None:
    """A result; None where there is none, InputError where the file is not one."""
    try:
        contents = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        contents = None
    parts = ("figures", "zeros", "identity")
    if not isinstance(contents, dict) or not all(isinstance(contents.get(p), dict) for p in parts):
        raise InputError(f"{path} is not a result of a study: remove it to have it made again.")
    return contents


def write(path: Path, contents: dict) -> None:
    """Write a result whole."""
    make_folder(path.parent)
    write_json(path, contents, "result")


def identity(study: Study, cfg: Node, processes: int, images: dict | None = None) -> dict:
    """What decides a cell's figures; plain data. images: fingerprints of the splits, if known."""
    known = {"options": config.to_dict(cfg), "processes": processes}
    return known | _judged(study, images)


def training_identity(cfg: Node, processes: int, images: str) -> dict:
    """What decides a cell's weights; plain data. images: the training split's fingerprint."""
    return {"options": config.to_dict(cfg), "processes": processes, "images": images}


def random_identity(study: Study, row: RandomRow, images: dict | None = None) -> dict:
    """What decides the figures of a random network; plain data."""
    added = attending_shape(study.config(cell) for cell in row.cells)
    return {"network": row.shape | added} | _judged(study, images)


def _judged(study: Study, images: dict | None) -> dict:
    return {"evaluate": study.protocol.identity} | ({"images": images} if images else {})


def misfit(stored: dict, wanted: dict, where: Path, weights_only: bool = False) -> str:
    """In what an identity that is stored at `where` differs from the wanted one; "" if it fits.

    weights_only: options that decide figures but no weights may differ.
    """
    differences = [
        f"{name} (was {_short(stored.get(name))}, now {_short(value)})"
        for name, value in wanted.items()
        if name != "options" and stored.get(name) != value
    ]
    if "options" in wanted:
        decisive = config.deciding(SHAPES, WEIGHTS, *(() if weights_only else (FIGURES,)))
        was, now = (config.from_dict(tree.get("options"), str(where)) for tree in (stored, wanted))
        differences += [
            f"{name} (was {config.get(was, name)}, now {config.get(now, name)})"
            for name in config.differing(was, now, decisive)
        ]
    return "; ".join(differences)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(inner)}" for key, inner in value.items())
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
