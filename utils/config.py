"""Options as a yacs node: defaults, what files, flags and KEY VALUE pairs lay over them, checks.

A wrong key or value is an InputError that says where it stands and names the nearest key. What
values an option may have is declared in utils/options.py; below is what cannot work together.
"""

import contextlib
import copy
import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as Node

from utils.errors import InputError
from utils.files import write_text
from utils.logging import logger
from utils.normalisation import IMAGENET, Normalisation
from utils.options import CONTRASTIVE, NOTHING, OPTIONS, SECTIONS, Option

# Reading YAML takes seconds for each megabyte; all options are 4 kB.
LARGEST_FILE = 1 << 16  # bytes
LARGEST_NUMBER = 2**63 - 1  # as in tensors
WHOLE = re.compile(r"[+-]?[0-9]{1,19}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
AUTO_CROPS = {"cuda": "device", "cpu": "workers"}  # what DATA.CROPS auto is
TRUTH = {"true": True, "yes": True, "on": True, "1": True}
TRUTH |= {"false": False, "no": False, "off": False, "0": False}
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list of numbers",
    str: "a text, in quotes",
}


def defaults() -> Node:
    """A fresh copy of the defaults."""
    cfg = Node()
    for name, option in OPTIONS.items():
        section, _, key = name.rpartition(".")
        node = cfg.setdefault(section, Node()) if section else cfg
        node[key] = copy.copy(option.default)
    return cfg


def get(cfg: Node, key: str) -> Any:
    """The value of SECTION.KEY."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def put(cfg: Node, key: str, value: object, source: str) -> None:
    """Set SECTION.KEY from a value of `source` (a file, a flag, the command line).

    A text is read by `scalar`; [1, 2] is a list. An integer passes for a float, and a single value
    for a list of one; any other change of type, or an unknown key, is an InputError.
    """
    if key not in OPTIONS:
        raise InputError(f"{source}: there is no option '{key}'.{_hint(key)}")
    value = _typed(value, OPTIONS[key], source)
    # yacs reads texts as Python's literals: as one, a path '123' stays a text.
    cfg.merge_from_list([key, repr(value) if isinstance(value, str) else value])


def _hint(key: str) -> str:
    if key and key in SECTIONS:
        first = next(name for name in OPTIONS if name.startswith(f"{key}."))
        return f" It is a section; {first} is one in it."
    near = difflib.get_close_matches(key.upper(), OPTIONS, n=1, cutoff=0.5)
    near += [name for name in OPTIONS if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f" Did you mean {near[0]}?" if near else " docs/configuration.md lists them all."


def scalar(text: str) -> object:
    """What a plain word stands for, in a file as on the command line (docs/configuration.md)."""
    text = text.strip()
    if NUMBER.fullmatch(text):
        return int(text) if WHOLE.fullmatch(text) else float(text)
    return _WORDS.get(text.lower(), text)


def _typed(value: object, option: Option, source: str) -> object:
    kind, read = type(option.default), value
    if kind is bool:
        read = TRUTH.get(str(value).lower(), value)
    elif kind is list:
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            value = value[1:-1].split(",") if value[1:-1].strip() else []
        entries = value if isinstance(value, list | tuple) else [value]
        read = [scalar(entry) if isinstance(entry, str) else entry for entry in entries]
    elif kind is not str and isinstance(value, str):
        read = scalar(value)
    if kind is float and type(read) is int:
        read = float(read)
    fits = type(read) is kind
    if kind is list:
        fits = all(type(entry) in (int, float) for entry in read)
    if not fits:
        raise InputError(f"{source}: {option.name} must be {KINDS[kind]}, not {value!r}.")
    if option.lower or option.choices:
        read = read.lower()
    if kind is str and not _may_be_a_name(read):
        raise InputError(
            f"{source}: {option.name} must be text that can name a file, not {read!r}."
        )
    return os.path.expanduser(read) if option.path else read


def _may_be_a_name(text: str) -> bool:
    """Whether the system can take it for a file's name: no null, no half of a surrogate pair."""
    with contextlib.suppress(UnicodeEncodeError):
        return b"\0" not in os.fsencode(text)
    return False


class _Reader(yaml.BaseLoader):
    """YAML whose plain words are read by `scalar`, and whose names and quoted words are texts.

    No tags, no aliases, by which a few lines may stand for billions, and no repeated names.
    """

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse(f"write out what *{event.anchor} stands for", event)
        if getattr(event, "tag", None):
            self._refuse(f"leave out the tag {event.tag}", event)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode) -> object:
        return node.value if node.style else scalar(node.value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, object]:
        tree: dict[str, object] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse("a name should stand here", key)
            if key.value in tree:
                self._refuse(f"{key.value} is there twice", key)
            tree[key.value] = self.construct_object(value, deep=True)
        return tree

    def _refuse(self, reason: str, where: yaml.Event | yaml.Node) -> None:
        raise yaml.MarkedYAMLError(problem=reason, problem_mark=where.start_mark)


class _Writer(yaml.SafeDumper):
    """YAML that any reader takes alike: texts that are numbers to `scalar` are quoted, too."""


_Writer.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("+-.0123456789"))


def read_file(path: str | Path, flag: str = "--cfg") -> object:
    """The contents of a small YAML file that `flag` names; InputError for whatever is wrong."""
    try:
        path = Path(os.path.expanduser(path))
        if not path.is_file():
            raise InputError(f"{flag}: there is no file {path}.")
        with open(path, "rb") as file:
            contents = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"{flag}: {path} cannot be read ({error.strerror}).") from None
    if len(contents) > LARGEST_FILE:
        raise InputError(f"{path} is no file of options: it is larger than {LARGEST_FILE} bytes.")
    try:
        return yaml.load(contents.decode(), _Reader)
    except RecursionError:
        raise InputError(f"{path} is not a YAML file: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of bytes and escapes, too
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a YAML file: {reason}.") from None


def merge_file(cfg: Node, path: str | Path) -> list[str]:
    """Lay a YAML file's options over `cfg`; returns their names.

    InputError for a bad file, key or value.
    """
    tree = read_file(path)
    if not isinstance(tree, dict | None):
        raise InputError(f"{path} must hold options as SECTION: KEY: value.")
    values = dict(flat(tree or {}, str(path)))
    for key, value in values.items():
        put(cfg, key, value, str(path))
    return list(values)


def flat(tree: dict, source: str, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(SECTION.KEY, value) of each option in nested data."""
    for key, value in tree.items():
        if not isinstance(key, str):
            raise InputError(f"{source}: {key!r} stands where an option's name should.")
        if not prefix and key in SECTIONS and isinstance(value, dict | None):
            # None: all lines of the section are commented out.
            yield from flat(value or {}, source, f"{key}.")
        else:
            yield f"{prefix}{key}", value


def to_dict(cfg: Node) -> dict:
    """Plain nested data of its own, for a checkpoint or a file."""
    return {k: to_dict(v) if isinstance(v, Node) else copy.copy(v) for k, v in cfg.items()}


def from_dict(tree: dict, source: str = "the checkpoint") -> Node:
    """The options of a stored run. What an earlier version had and exists no more, an option or a
    value of one, is ignored, and a line says so."""
    if not isinstance(tree, dict):
        raise InputError(f"{source} holds no options of a run.")
    cfg, gone = defaults(), []
    for key, value in flat(tree, source):
        if key == "CMD.LT" and not isinstance(value, bool):  # the name of a form, once
            gone.append(f"{key} {value}")
        elif key in OPTIONS or key in SECTIONS:
            put(cfg, key, value, source)
        else:
            gone.append(key)
    if gone:
        logger.warning(f"{source} holds options that exist no more: {', '.join(gone)} are ignored.")
    return cfg


def write(cfg: Node, path: str | Path) -> None:
    """The resolved options as YAML; raises InputError where they cannot be written."""
    write_text(path, yaml.dump(to_dict(cfg), Dumper=_Writer, sort_keys=False))


def deciding(*what: str) -> list[str]:
    """Names of the options that decide one of these, e.g. SHAPES (utils/options.py)."""
    return [name for name, option in OPTIONS.items() if option.decides in what]


def unread(*trees: Node) -> set[str]:
    """Names of the options that the objective of none of these reads."""
    objectives = {tree.LOSS.OBJECTIVE for tree in trees}
    owned = {name: option.objectives for name, option in OPTIONS.items() if option.objectives}
    return {name for name, readers in owned.items() if objectives.isdisjoint(readers)}


def differing(a: Node, b: Node, names: Iterable[str] = OPTIONS) -> list[str]:
    """Those of `names` whose values differ."""
    return [name for name in names if get(a, name) != get(b, name)]


def changed(cfg: Node) -> str:
    """The options that are not the defaults and decide a figure, as text; "none" where all are."""
    silent = {*deciding(NOTHING), *unread(cfg)}
    names = [name for name in OPTIONS if name not in silent]
    words = [f"{name} {get(cfg, name)}" for name in differing(cfg, defaults(), names)]
    return ", ".join(words) or "none"


# What can work, whatever the data and the model


def check(cfg: Node) -> None:
    """Raise InputError for the first value, or combination of them, that cannot work."""
    for name, option in OPTIONS.items():
        _check_value(option, get(cfg, name))
    _check_crops(cfg)
    if bool(cfg.DATA.MEAN) != bool(cfg.DATA.STD):
        raise InputError("DATA.MEAN and DATA.STD belong together: give both or neither.")
    if cfg.INIT.BATCH_NORM == "statistics" and not cfg.INIT.WEIGHTS:
        raise InputError(
            "INIT.BATCH_NORM statistics keeps those that came with weights, and there are none: "
            "give INIT.WEIGHTS (--init), or leave it out."
        )
    _check_schedules(cfg)
    _check_batch(cfg)
    _check_figures(cfg)


def _check_value(option: Option, value: Any) -> None:
    name = option.name
    if option.choices and value not in option.choices:
        near = difflib.get_close_matches(value, option.choices, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        named = ", ".join(filter(None, option.choices))
        raise InputError(f"{name} must be one of {named}, not '{value}'.{hint}")
    if isinstance(value, str):
        return
    numbers = value if isinstance(value, list) else [value]
    if option.filled and not numbers:
        raise InputError(f"{name} is empty: give at least one number.")
    if option.length not in (None, len(numbers)) and value != option.default:
        raise InputError(f"{name} must have {option.length} values, not {value}.")
    if option.whole and not all(isinstance(number, int) for number in numbers):
        raise InputError(f"{name} must be whole numbers, not {value}.")
    for number in numbers:
        if not math.isfinite(number):
            raise InputError(f"{name} must be a finite number, not {number}.")
        if option.at_least is not None and number < option.at_least:
            raise InputError(f"{name} must be at least {option.at_least}, not {number}.")
        most = option.at_most
        if most is None:
            most = LARGEST_NUMBER if isinstance(number, int) else math.inf
        if number > most:
            raise InputError(f"{name} must be at most {most}, not {number}.")


def _check_crops(cfg: Node) -> None:
    aug = cfg.AUG
    for key in ("GLOBAL_CROPS_SCALE", "LOCAL_CROPS_SCALE"):
        low, high = aug[key]
        if not 0 < low <= high:
            raise InputError(f"AUG.{key} must rise between 0 and 1, not {aug[key]}.")
    if aug.COLOR_JITTER[3] > 0.5:
        raise InputError(f"AUG.COLOR_JITTER's hue must be at most 0.5, not {aug.COLOR_JITTER[3]}.")
    counts, sizes = aug.LOCAL_CROPS_NUMBER, aug.LOCAL_CROPS_SIZE
    if sum(counts) and min(sizes, default=0) < 1:
        raise InputError(f"AUG.LOCAL_CROPS_SIZE must be positive, not {sizes}.")
    if sum(counts) and len(counts) != len(sizes):
        raise InputError(
            f"AUG.LOCAL_CROPS_NUMBER {counts} and AUG.LOCAL_CROPS_SIZE {sizes} must be equally "
            f"long: one number for each size."
        )


def _check_schedules(cfg: Node) -> None:
    for key in ("TRAIN.WARMUP_EPOCHS", "LOSS.WARMUP_TEACHER_TEMP_EPOCHS", "INIT.HEADS_EPOCHS"):
        if get(cfg, key) > cfg.TRAIN.EPOCHS:
            raise InputError(
                f"{key} {get(cfg, key)} is longer than the run of {cfg.TRAIN.EPOCHS} epochs "
                f"(TRAIN.EPOCHS). Shorten the one or lengthen the other."
            )


def _check_batch(cfg: Node) -> None:
    objective, images = cfg.LOSS.OBJECTIVE, cfg.TRAIN.BATCH_SIZE_PER_GPU
    if objective in CONTRASTIVE and local_crops(cfg):
        raise InputError(
            f"LOSS.OBJECTIVE {objective} contrasts two crops of an image, without local ones. "
            f"Its recipe: --cfg experiments/{objective}.yaml; AUG.LOCAL_CROPS_NUMBER [] alone "
            f"keeps the optimizer, momentum, head and crops of the others."
        )
    if images < 2 and objective in CONTRASTIVE:
        raise InputError(
            f"LOSS.OBJECTIVE {objective} compares the images of a batch: "
            f"TRAIN.BATCH_SIZE_PER_GPU must be at least 2, not {images}."
        )


def _check_figures(cfg: Node) -> None:
    given = [name for name in ("EVAL.KNN_TRAIN", "EVAL.KNN_VAL") if get(cfg, name)]
    if figures_every(cfg) is None:
        if cfg.CKPT.KEEP == "best":
            raise InputError(
                "CKPT.KEEP best (--keep) goes by the figures of EVAL.KNN_EVERY, which is 0: set "
                "it to 1, or leave it out."
            )
    elif len(given) == 1:
        raise InputError(
            f"{given[0]} is given alone: a k-NN needs EVAL.KNN_TRAIN and EVAL.KNN_VAL, two folders."
        )


# What several options mean together


def local_crops(cfg: Node) -> list[tuple[int, int]]:
    """(number, size in pixels) of each kind of local crop; empty for none."""
    pairs = zip(cfg.AUG.LOCAL_CROPS_NUMBER, cfg.AUG.LOCAL_CROPS_SIZE, strict=False)
    return [(number, size) for number, size in pairs if number]


def figures_every(cfg: Node) -> int | None:
    """Epochs between figures of the features in pretraining: EVAL.KNN_EVERY.

    0: at the start and the end alone; None: not at all. -1 is that of the run: 1 with CKPT.KEEP
    best, 0 where it starts from weights, else none.
    """
    every = cfg.EVAL.KNN_EVERY
    if every >= 0:
        return every or None
    if cfg.CKPT.KEEP == "best":
        return 1
    return 0 if cfg.INIT.WEIGHTS else None


def knn_folders(cfg: Node) -> tuple[str, str] | None:
    """Gallery and queries of the k-NN in pretraining, where one is made."""
    given = cfg.EVAL.KNN_TRAIN and figures_every(cfg) is not None
    return (cfg.EVAL.KNN_TRAIN, cfg.EVAL.KNN_VAL) if given else None


def settle_crops(cfg: Node, device: str) -> None:
    """Put in the place of DATA.CROPS auto what it is on a device of this kind, "cuda" or "cpu"."""
    if cfg.DATA.CROPS == "auto":
        cfg.DATA.CROPS = AUTO_CROPS[device]


def settle_start(cfg: Node, stored: Node | None = None) -> None:
    """Put in the place of INIT's "by itself" what it is where INIT.WEIGHTS is given.

    stored: options of the run that goes on, which are taken as they are, with its INIT.WEIGHTS.
    Without INIT.WEIGHTS, and in a run of a version without these options, "by itself" stays, and
    means off.
    """
    heads = int(cfg.TRAIN.EPOCHS > 1)
    recipe = {"HEADS_EPOCHS": heads, "LAYER_DECAY": 0.9, "BATCH_NORM": "statistics"}
    own = stored.INIT if stored else recipe
    cfg.INIT.WEIGHTS = cfg.INIT.WEIGHTS or (stored.INIT.WEIGHTS if stored else "")
    if stored or cfg.INIT.WEIGHTS:
        for key, unset in (("HEADS_EPOCHS", -1), ("LAYER_DECAY", 0), ("BATCH_NORM", "")):
            if cfg.INIT[key] == unset:
                cfg.INIT[key] = own[key]


def crops_on_device(cfg: Node) -> bool:
    """Whether crops are made on the device, of a batch at a time; DATA.CROPS is settled."""
    return cfg.DATA.CROPS == "device" or cfg.DATA.CACHE != "none"


def normalisation(cfg: Node) -> Normalisation:
    """DATA.MEAN and DATA.STD; ImageNet's where they are not given."""
    data = cfg.DATA
    return Normalisation(tuple(data.MEAN), tuple(data.STD)) if data.MEAN else IMAGENET


def eval_size(cfg: Node) -> int:
    """Pixels of an evaluation's centre crop: EVAL.SIZE, else the run's global crops'."""
    return cfg.EVAL.SIZE or cfg.AUG.GLOBAL_CROPS_SIZE
