"""A study: pretraining cells x seeds under one protocol, as a YAML of experiments/studies says.

data:       name -> {synthetic: {train, val, seed, difficulty, SETTING: value}}, or
            name -> folder (that of --data_path, with train and val)
base:       a YAML of options that all cells start from, relative to the repository
options:    options laid over it, as SECTION: {KEY: value} or SECTION.KEY: value
seeds:      [0, 1]: every cell is pretrained with each
cells:      name -> options of its own; beside them `data` (which set, where there are
            several), `title` (its name in the tables) and `base` (a YAML that this cell starts
            from in the place of the study's; `options` are laid over that too)
order:      groups of cells, [[a, b], [c]]: one group after the other, within it all cells
            with the first seed before any with the second; cells not named come last
evaluate:   poolings (of default, mean, mil, lcr, where the network has them), k, linear,
            baseline (the cell, or one for each data set, that others are compared with),
            knn_every (epochs between the k-NN tests of a run, for its curve)
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from datasets.synthetic_images import DIFFICULTIES, SyntheticConfig
from utils import config
from utils.config import Node
from utils.errors import InputError
from utils.options import OPTIONS

ROOT = Path(__file__).parents[2]
RANDOM = "random"  # first part of the names of randomly initialised networks
_NAME = re.compile(r"[A-Za-z0-9_.]+")
_SECTIONS = ("data", "base", "options", "seeds", "cells", "order", "evaluate")
_COUNTS = ("train", "val", "seed", "difficulty")


@dataclass(frozen=True)
class DataSet:
    """images: what write_folder renders, None for a folder that the user has.

    seed, train, val: of the rendered images; 0 for a folder.
    """

    name: str
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
    """poolings: of the k-NN. k: its neighbours. linear: whether there is a probe.

    baselines: data set -> the cell that others on it are compared with. knn_every: epochs
    between the k-NN tests of a run, for its curve; 0: none.
    """

    poolings: tuple[str, ...]
    k: int
    linear: bool
    baselines: dict[str, str]
    knn_every: int = 0

    @property
    def identity(self) -> dict:
        """What decides a network's figures; plain data."""
        return {"poolings": list(self.poolings), "k": self.k, "linear": self.linear}


@dataclass(frozen=True)
class Study:
    """A study as its file says it, checked."""

    path: Path
    data: dict[str, DataSet]
    seeds: tuple[int, ...]
    cells: dict[str, Cell]
    order: tuple[tuple[str, ...], ...]
    protocol: Protocol

    @property
    def name(self) -> str:
        return self.path.stem

    def config(self, cell: str, seed: int = 0) -> Node:
        """A cell's resolved options; InputError for what cannot work, with the cell's name."""
        cfg = config.defaults()
        config.merge_file(cfg, self.cells[cell].base)
        where = f"{self.path}, cell {cell}"
        for key, value in self.cells[cell].options.items():
            config.put(cfg, key, value, where)
        cfg.SEED = seed
        try:
            config.check(cfg)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return cfg

    def runs(self, cells: Iterable[str], seeds: Iterable[int]) -> Iterator[tuple[str, int]]:
        """(cell, seed) of these cells and seeds, in the order of the study."""
        wanted = set(cells)
        for group in self.order:
            for seed in seeds:
                yield from ((cell, seed) for cell in group if cell in wanted)

    def overlaid(self, pairs: Iterable[tuple[str, Any]]) -> "Study":
        """The same study with these options on top of every cell's; checked."""
        read = _options(dict(pairs), "command line")
        cells = {
            name: replace(cell, options=cell.options | read) for name, cell in self.cells.items()
        }
        study = replace(self, cells=cells)
        for cell in cells:
            study.config(cell)
        return study


def load(path: str | Path) -> Study:
    """The study in a YAML file; InputError for whatever is wrong with it, in one sentence."""
    path = Path(path).expanduser()
    tree = _mapping(_read(path), f"{path}", _SECTIONS)
    for section in ("data", "base", "cells"):
        if not tree.get(section):
            raise InputError(f"{path} is not a study: it lacks '{section}'.")
    data = {
        name: _data_set(name, entry, f"{path}, data {name}")
        for name, entry in _named(tree["data"], f"{path}, data").items()
    }
    if sum(entry.images is None for entry in data.values()) > 1:
        raise InputError(f"{path}, data: only one set can be the folder of --data_path.")
    base = _base(tree["base"], f"{path}")
    shared = _options(tree.get("options"), f"{path}, options")
    cells = {
        name: _cell(name, entry, data, base, shared, f"{path}, cell {name}")
        for name, entry in _named(tree["cells"], f"{path}, cells").items()
    }
    seeds = tree.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(_is_whole(s) for s in seeds):
        raise InputError(f"{path}: seeds must be a list of whole numbers from 0, not {seeds}.")
    study = Study(
        path,
        data,
        tuple(dict.fromkeys(seeds)),
        cells,
        _order(tree.get("order"), cells, f"{path}, order"),
        _protocol(tree.get("evaluate"), cells, f"{path}, evaluate"),
    )
    return study.overlaid(())


def choose(wanted: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """`wanted`, each of them one of `known`; else an InputError with the nearest."""
    known = list(known)
    wanted = list(wanted)
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
            raise InputError(f"{what}: there is no '{name}'. {hint}")
    return wanted


def _read(path: Path) -> object:
    try:
        return config.read_yaml(path.read_text())
    except OSError as error:
        raise InputError(f"--study: {path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}.") from None


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
    for name in (named := _mapping(tree, where)):
        if not _NAME.fullmatch(name) or name.startswith(RANDOM):
            raise InputError(
                f"{where}: the name '{name}' must be of letters, digits, dots and underscores, "
                f"and not begin with '{RANDOM}'."
            )
    return named


def _options(tree: object, where: str) -> dict[str, Any]:
    """Options by name, in their types."""
    cfg, found = config.defaults(), {}
    for key, value in _flat(_mapping(tree, where)).items():
        config.put(cfg, key, value, where)
        if key in ("OUTPUT_DIR", "DATA.PATH", "SEED"):
            raise InputError(f"{where}: {key} is set for each run; it cannot be an option.")
        found[key] = config.get(cfg, key)
    return found


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        inner = value if isinstance(value, dict) else None
        found |= {f"{prefix}{key}": value} if inner is None else _flat(inner, f"{prefix}{key}.")
    return found


def _data_set(name: str, entry: object, where: str) -> DataSet:
    if entry == "folder":
        return DataSet(name)
    settings = [field.name for field in fields(SyntheticConfig)]
    kind = _mapping(entry, f"{where} ('folder' or 'synthetic')", ("synthetic",))
    tree = _mapping(kind.get("synthetic"), where, (*_COUNTS, *settings))
    for key in ("train", "val"):
        if not _is_whole(tree.get(key)):
            raise InputError(f"{where}: {key} must be a number of images.")
    if not _is_whole(tree.get("seed", 0)):
        raise InputError(f"{where}: seed must be a whole number from 0.")
    (difficulty,) = choose([tree.get("difficulty", "easy")], DIFFICULTIES, f"{where}, difficulty")
    given = {key: value for key, value in tree.items() if key in settings}
    try:
        images = replace(DIFFICULTIES[difficulty], **given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return DataSet(name, images, tree.get("seed", 0), tree["train"], tree["val"])


def _base(entry: object, where: str) -> Path:
    path = ROOT / str(entry)
    if not path.is_file():
        raise InputError(f"{where}: base names {path}, and there is no such file.")
    return path


def _cell(
    name: str,
    entry: object,
    data: dict[str, DataSet],
    base: Path,
    shared: dict[str, Any],
    where: str,
) -> Cell:
    tree = dict(_mapping(entry, where))
    title = str(tree.pop("title", name))
    if "|" in title or "\n" in title:
        raise InputError(f"{where}: a title is one line without '|'.")
    if "base" in tree:
        base = _base(tree.pop("base"), where)
    where_data = tree.pop("data", None if len(data) > 1 else next(iter(data)))
    if where_data is None:
        raise InputError(f"{where}: `data` must say which of {', '.join(data)} it is on.")
    (chosen,) = choose([where_data], data, f"{where}, data")
    return Cell(name, title, chosen, base, shared | _options(tree, where))


def _order(tree: object, cells: dict[str, Cell], where: str) -> tuple[tuple[str, ...], ...]:
    groups = [] if tree is None else tree
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise InputError(f"{where}: must be groups of cells, such as [[a, b], [c]], not {tree!r}.")
    named = choose([cell for group in groups for cell in group], cells, where)
    if len(set(named)) < len(named):
        raise InputError(f"{where}: a cell is there twice.")
    rest = [cell for cell in cells if cell not in named]
    return tuple(tuple(group) for group in (*groups, rest) if group)


def _protocol(tree: object, cells: dict[str, Cell], where: str) -> Protocol:
    tree = _mapping(tree, where, ("poolings", "k", "linear", "baseline", "knn_every"))
    poolings, k = tree.get("poolings", ["default"]), tree.get("k", 20)
    if not isinstance(poolings, list) or "default" not in poolings:
        raise InputError(f"{where}: poolings must be a list with 'default' in it, not {poolings}.")
    choose(poolings, OPTIONS["EVAL.POOLING"].choices, f"{where}, poolings")
    if not _is_whole(k) or k < 1:
        raise InputError(f"{where}: k must be a whole number from 1, not {k}.")
    if not isinstance(linear := tree.get("linear", True), bool):
        raise InputError(f"{where}: linear must be true or false, not {linear}.")
    if not _is_whole(every := tree.get("knn_every", 0)):
        raise InputError(f"{where}: knn_every must be a whole number from 0, not {every}.")
    named = tree.get("baseline", [])
    named = choose(named if isinstance(named, list) else [named], cells, f"{where}, baseline")
    baselines = {cells[name].data: name for name in named}
    if len(baselines) < len(named):
        raise InputError(f"{where}: a data set has one baseline, not several.")
    return Protocol(tuple(dict.fromkeys(poolings)), k, linear, baselines, every)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
