"""A study's file: pretraining cells x seeds under one protocol, a YAML of experiments/studies.

docs/studies.md shows one. Paths of a `base` are relative to the repository. Where there are several
data sets a cell says `data`, and `baseline` may be a list of one cell for each.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from datasets.synthetic_images import DIFFICULTIES, SyntheticConfig
from utils import config
from utils.config import Node
from utils.distributed import kind_of_device
from utils.errors import InputError
from utils.options import OPTIONS

ROOT = Path(__file__).parents[2]
# Options that decide figures elsewhere: a study says poolings and seeds itself, and its probe is a
# logistic regression, which knows no batch.
NOT_READ = ("EVAL.BATCH_SIZE_PER_GPU", "EVAL.POOLING", "EVAL.SEEDS")
RANDOM, START = "random", "start"  # first parts of the names of untrained networks
_NAME = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True)
class DataSet:
    """What write_folder renders; images: None for a folder that the user has."""

    images: SyntheticConfig | None = None
    seed: int = 0
    train: int = 0
    val: int = 0


@dataclass(frozen=True)
class Cell:
    """title: its name in tables. data: its data set's. options: by name, over the base."""

    name: str
    title: str
    data: str
    base: Path
    options: dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """poolings: of the k-NN. k: its neighbours.

    baselines: data set -> the cell that others on it are compared with.
    """

    poolings: tuple[str, ...]
    k: int
    baselines: dict[str, str]


@dataclass(frozen=True)
class Study:
    """A study as its file says it, checked."""

    path: Path
    data: dict[str, DataSet]
    seeds: tuple[int, ...]
    cells: dict[str, Cell]
    protocol: Protocol

    @property
    def name(self) -> str:
        return self.path.stem

    def config(self, cell: str, seed: int = 0) -> Node:
        """A cell's options as this machine resolves them; InputError, with the cell's name, for
        what cannot work."""
        cfg = config.defaults()
        config.merge_file(cfg, self.cells[cell].base)
        where = f"{self.path}, cell {cell}"
        for key, value in self.cells[cell].options.items():
            config.put(cfg, key, value, where)
        cfg.SEED = seed
        config.settle_crops(cfg, kind_of_device(cfg.DEVICE))
        config.settle_start(cfg)
        try:
            config.check(cfg)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return cfg

    def runs(self, cells: Iterable[str], seeds: Iterable[int]) -> Iterator[tuple[str, int]]:
        """(cell, seed) of these cells, in the study's order, with one seed after the other."""
        for seed in seeds:
            yield from ((cell, seed) for cell in self.cells if cell in cells)


def load(path: str | Path, pairs: Iterable[tuple[str, Any]] = ()) -> Study:
    """The study in a YAML file, with KEY VALUE pairs laid over every cell.

    Raises InputError for whatever is wrong with it, in one sentence.
    """
    path = Path(path).expanduser()
    sections = ("data", "base", "options", "seeds", "cells", "evaluate")
    tree = _mapping(config.read_file(path, "--study"), f"{path}", sections)
    for section in ("data", "base", "cells"):
        if not tree.get(section):
            raise InputError(f"{path} is not a study: it lacks '{section}'.")
    data = {
        name: _data_set(entry, f"{path}, data {name}")
        for name, entry in _named(tree["data"], f"{path}, data").items()
    }
    if sum(entry.images is None for entry in data.values()) > 1:
        raise InputError(f"{path}, data: only one set can be the folder of --data_path.")
    shared = _options(tree.get("options"), f"{path}, options")
    typed = _options(dict(pairs), "command line")
    cells = {}
    for name, entry in _named(tree["cells"], f"{path}, cells").items():
        own = {"title": name, "base": tree["base"]}
        own |= _mapping(entry, f"{path}, cell {name}")
        cells[name] = _cell(name, own, data, shared, typed, f"{path}, cell {name}")
    seeds = tree.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(_is_whole(seed) for seed in seeds):
        raise InputError(f"{path}: seeds must be a list of whole numbers from 0, not {seeds}.")
    protocol = _protocol(tree.get("evaluate"), cells, f"{path}, evaluate")
    study = Study(path, data, tuple(dict.fromkeys(seeds)), cells, protocol)
    for name in cells:
        study.config(name)
    return study


def choose(wanted: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """`wanted`, each of them one of `known`; else an InputError with the nearest."""
    wanted, known = list(wanted), list(known)
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
            raise InputError(f"{what}: there is no '{name}'. {hint}")
    return wanted


def _mapping(tree: object, where: str, known: Iterable[str] = ()) -> dict[str, Any]:
    """A mapping with text for keys, of these if any are given; of nothing an empty one."""
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise InputError(f"{where} must be given as KEY: value, not {tree!r}.")
    if known:
        choose(tree, known, where)
    return tree


def _named(tree: object, where: str) -> dict[str, Any]:
    """A mapping whose keys can name files."""
    named = _mapping(tree, where)
    for name in named:
        if not _NAME.fullmatch(name) or name.startswith((RANDOM, START)):
            raise InputError(
                f"{where}: the name '{name}' must be of letters, digits, dots and underscores, "
                f"and not begin with '{RANDOM}' or '{START}'."
            )
    return named


def _is_whole(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _whole(tree: dict, key: str, default: int | None, least: int, where: str) -> int:
    value = tree.get(key, default)
    if not _is_whole(value, least):
        raise InputError(f"{where}: {key} must be a whole number from {least}, not {value}.")
    return value


def _options(tree: object, where: str) -> dict[str, Any]:
    """Options by name, in their types."""
    cfg, found = config.defaults(), {}
    for key, value in config.flat(_mapping(tree, where), where):
        config.put(cfg, key, value, where)
        if key in ("OUTPUT_DIR", "DATA.PATH", "SEED"):
            raise InputError(f"{where}: {key} is set for each run; it cannot be an option.")
        found[key] = config.get(cfg, key)
    return found


def _data_set(entry: object, where: str) -> DataSet:
    if entry == "folder":
        return DataSet()
    settings = [field.name for field in fields(SyntheticConfig)]
    kind = _mapping(entry, f"{where} ('folder' or 'synthetic')", ("synthetic",))
    known = ("train", "val", "seed", "difficulty", *settings)
    tree = {"difficulty": "easy"} | _mapping(kind.get("synthetic"), where, known)
    choose([tree["difficulty"]], DIFFICULTIES, f"{where}, difficulty")
    given = {key: value for key, value in tree.items() if key in settings}
    try:
        images = replace(DIFFICULTIES[tree["difficulty"]], **given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    numbers = {"seed": 0, "train": None, "val": None}
    return DataSet(images, **{key: _whole(tree, key, of, 0, where) for key, of in numbers.items()})


def _cell(
    name: str, tree: dict, data: dict[str, DataSet], shared: dict, typed: dict, where: str
) -> Cell:
    """shared: options below the cell's own; typed: above them."""
    if len(data) > 1 and "data" not in tree:
        raise InputError(f"{where}: `data` must say which of {', '.join(data)} it is on.")
    (chosen,) = choose([tree.pop("data", next(iter(data)))], data, f"{where}, data")
    title, base = tree.pop("title"), ROOT / str(tree.pop("base"))
    if not isinstance(title, str):
        raise InputError(f"{where}: title must be a text, in quotes, not {title!r}.")
    if not base.is_file():
        raise InputError(f"{where}: base names {base}, and there is no such file.")
    return Cell(name, title, chosen, base, shared | _options(tree, where) | typed)


def _protocol(tree: object, cells: dict[str, Cell], where: str) -> Protocol:
    tree = _mapping(tree, where, ("poolings", "k", "baseline"))
    poolings, named = tree.get("poolings", ["default"]), tree.get("baseline", [])
    if not isinstance(poolings, list) or "default" not in poolings:
        raise InputError(f"{where}: poolings must be a list with 'default' in it, not {poolings}.")
    choose(poolings, OPTIONS["EVAL.POOLING"].choices, f"{where}, poolings")
    named = choose(named if isinstance(named, list) else [named], cells, f"{where}, baseline")
    baselines = {cells[name].data: name for name in named}
    if len(baselines) < len(named):
        raise InputError(f"{where}: a data set has one baseline, not several.")
    return Protocol(tuple(dict.fromkeys(poolings)), _whole(tree, "k", 20, 1, where), baselines)
