"""How a run's options are put together, from the defaults in utils/options.py.

Precedence: KEY VALUE over flag over YAML over default (utils/cli.py has the flags). `check`
says in one sentence what cannot work, before anything runs.
"""

import contextlib
import copy
import difflib
import math
import os
from pathlib import Path

import yaml
from yacs.config import CfgNode as Node

from utils.errors import InputError
from utils.files import write_text
from utils.options import CHOICES, COMPARING, CONTRASTIVE, DEFAULTS, RANGES, RENAMED

# Reading YAML takes seconds for each megabyte; all options are 4 kB.
LARGEST_FILE = 1 << 16  # bytes
LONGEST_VALUE = 1 << 12  # characters of a number or a list
LARGEST_NUMBER = 2**63 - 1  # of whole ones, as in tensors


def defaults() -> Node:
    """A fresh copy of the defaults."""
    return DEFAULTS.clone()


def option_names(node: Node | None = None, prefix: str = "") -> list[str]:
    """All option names, as SECTION.KEY."""
    names: list[str] = []
    for key, value in (DEFAULTS if node is None else node).items():
        names += (
            option_names(value, f"{prefix}{key}.") if isinstance(value, Node) else [prefix + key]
        )
    return names


def get(cfg: Node, key: str):
    """The value of SECTION.KEY."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def put(cfg: Node, key: str, value: object, source: str) -> None:
    """Set SECTION.KEY from a value of `source` (a file, a flag, the command line).

    Strings are read as YAML, so that 1e-4, true and [1, 2] mean what they say. An integer
    passes for a float, and a single value for a list of one; any other change of type, or
    an unknown key, is an InputError that names the nearest key.
    """
    if key not in option_names():
        near = difflib.get_close_matches(key.upper(), option_names(), n=1, cutoff=0.5)
        if not near:
            same_end = [
                name for name in option_names() if name.split(".")[-1] == key.split(".")[-1]
            ]
            near = same_end[:1]
        hint = f" Did you mean {near[0]}?" if near else " docs/configuration.md lists them all."
        if isinstance(DEFAULTS.get(key), Node):
            hint = f" It is a section; {option_names(DEFAULTS[key], f'{key}.')[0]} is one in it."
        raise InputError(f"{source}: there is no option '{key}'.{hint}")
    default = get(DEFAULTS, key)
    *sections, name = key.split(".")
    node = cfg
    for section in sections:
        node = node[section]
    node[name] = _typed(value, default, key, source)


def _typed(value: object, default: object, key: str, source: str) -> object:
    if isinstance(value, str) and not isinstance(default, str):
        value = _scalar(value)
    if isinstance(default, list):
        value = list(value) if isinstance(value, list | tuple) else [value]
        value = [_scalar(v) if isinstance(v, str) else v for v in value]
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(n, int) and abs(n) > LARGEST_NUMBER for n in numbers):
        raise InputError(f"{source}: {key} must lie within {LARGEST_NUMBER}, the largest number.")
    if isinstance(default, bool):
        # EsViT's users type 0 and 1.
        value = bool(value) if value in (0, 1) else value
        fits = isinstance(value, bool)
    elif isinstance(default, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    elif isinstance(default, int):
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, list):
        fits = all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    else:
        fits = isinstance(value, str)
    if not fits:
        kind = {bool: "true or false", float: "a number", int: "a whole number"}.get(
            type(default), "a list of numbers" if isinstance(default, list) else "a text"
        )
        raise InputError(f"{source}: {key} must be {kind}, not {_shown(value)}.")
    if isinstance(value, str) and not _may_be_a_name(value):
        raise InputError(f"{source}: {key} must be text that can name a file, not {value!r}.")
    return value


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python prints no number of thousands of digits
        return "so large a number"


def _may_be_a_name(text: str) -> bool:
    """Whether the system can take it for a file's name: no null, no half of a surrogate pair."""
    with contextlib.suppress(UnicodeEncodeError):
        return b"\0" not in os.fsencode(text)
    return False


class _Reader(yaml.SafeLoader):
    """Plain YAML. No aliases, by which a few lines may stand for billions, nor repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"write out what *{event.anchor} stands for", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen: set[str] = set()
        for key, _ in pairs:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is there twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> object:
    """The contents of YAML; yaml.YAMLError for whatever is wrong with it."""
    try:
        return yaml.load(text, _Reader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        # What PyYAML meets a value with that is not of its tag, such as !!int x.
        raise yaml.YAMLError(f"a value cannot be read ({error})") from None


def _scalar(text: str) -> object:
    if len(text) > LONGEST_VALUE:
        return text
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a string: it wants 1.0e-4.
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def merge_file(cfg: Node, path: str | Path) -> list[str]:
    """Lay a YAML file's options over `cfg`; returns their names.

    InputError for a bad file, key or value.
    """
    try:
        path = Path(os.path.expanduser(path))
        if not path.is_file():
            raise InputError(f"--cfg: there is no file {path}.")
        with open(path, "rb") as file:
            contents = file.read(LARGEST_FILE + 1)
    except ValueError:  # a null character
        raise InputError(f"--cfg: there is no file {path}.") from None
    except OSError as error:
        raise InputError(f"--cfg: {path} cannot be read ({error.strerror}).") from None
    if len(contents) > LARGEST_FILE:
        raise InputError(f"{path} is no file of options: it is larger than {LARGEST_FILE} bytes.")
    try:
        tree = read_yaml(contents.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a YAML file: {reason}.") from None
    if tree is None:
        return []
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold options as SECTION: KEY: value.")
    return _merge_tree(cfg, tree, "", str(path))


def _merge_tree(cfg: Node, tree: dict, prefix: str, source: str) -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        if not isinstance(key, str):
            raise InputError(f"{source}: {_shown(key)} stands where an option's name should.")
        name = RENAMED.get(f"{prefix}{key}", f"{prefix}{key}")
        is_section = isinstance(DEFAULTS.get(name), Node)
        if is_section and isinstance(value, dict):
            names += _merge_tree(cfg, value, f"{name}.", source)
        elif is_section and value is None:
            continue  # all its lines are commented out
        else:
            put(cfg, name, value, source)
            names.append(name)
    return names


def to_dict(cfg: Node) -> dict:
    """Plain nested data of its own, for a checkpoint or a file."""
    return {k: to_dict(v) if isinstance(v, Node) else copy.copy(v) for k, v in cfg.items()}


def from_dict(tree: dict, source: str = "the checkpoint") -> Node:
    """Options of a stored run; InputError for what are none, or one that no longer exists."""
    if not isinstance(tree, dict):
        raise InputError(f"{source} holds no options of a run.")
    cfg = defaults()
    _merge_tree(cfg, tree, "", source)
    return cfg


def write(cfg: Node, path: str | Path) -> None:
    """The resolved options as YAML; raises InputError where they cannot be written."""
    write_text(path, yaml.safe_dump(to_dict(cfg), sort_keys=False))


def differing(a: Node, b: Node, ignore: tuple[str, ...] = ()) -> list[str]:
    """Names of options whose values differ, but for the ignored options and sections."""
    return [
        key
        for key in option_names()
        if key not in ignore and key.split(".")[0] not in ignore and get(a, key) != get(b, key)
    ]


def check(cfg: Node) -> None:
    """Raise InputError for the first thing that cannot work, whatever the data and the model."""
    for key, choices in CHOICES.items():
        if get(cfg, key) not in choices:
            near = difflib.get_close_matches(str(get(cfg, key)), choices, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            if key == "RESUME":
                hint = (
                    " A run resumes from its own --output_dir; --pretrained_weights_ckpt starts "
                    "from another's weights."
                )
            raise InputError(
                f"{key} must be one of {', '.join(choices)}, not '{get(cfg, key)}'.{hint}"
            )
    for key in option_names():
        low, high = RANGES.get(key, (None, None))
        values = get(cfg, key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str):
                continue
            if not math.isfinite(value):
                raise InputError(f"{key} must be a finite number, not {value}.")
            if low is not None and value < low:
                raise InputError(f"{key} must be at least {low}, not {value}.")
            if high is not None and value > high:
                raise InputError(f"{key} must be at most {high}, not {value}.")
    for key in ("KNN.KS", "LINEAR.C", "LINEAR.LABEL_SHARES"):
        if not get(cfg, key):
            raise InputError(f"{key} is empty: give at least one number.")
    if not all(isinstance(k, int) for k in cfg.KNN.KS):
        raise InputError(f"KNN.KS must be whole numbers, not {cfg.KNN.KS}.")
    _check_crops(cfg)
    if cfg.DATA.CROPS == "workers" and cfg.DATA.CACHE != "none":
        raise InputError(
            f"DATA.CROPS workers contradicts DATA.CACHE {cfg.DATA.CACHE}: crops of kept images are "
            f"made on the device. Set DATA.CROPS auto or DATA.CACHE none."
        )
    _check_schedules(cfg)
    if cfg.LOSS.OBJECTIVE in CONTRASTIVE and local_crops(cfg):
        raise InputError(
            f"LOSS.OBJECTIVE {cfg.LOSS.OBJECTIVE} contrasts two crops of an image and wants no "
            f"local ones. Its recipe: --cfg experiments/{cfg.LOSS.OBJECTIVE}.yaml; "
            f"AUG.LOCAL_CROPS_NUMBER [] alone keeps the optimizer, momentum, head and crops of the "
            f"others."
        )
    if cfg.LOSS.OBJECTIVE in CONTRASTIVE and cfg.TRAIN.BATCH_SIZE_PER_GPU < 2:
        raise InputError(
            f"LOSS.OBJECTIVE {cfg.LOSS.OBJECTIVE} contrasts images: TRAIN.BATCH_SIZE_PER_GPU must "
            f"be at least 2, not {cfg.TRAIN.BATCH_SIZE_PER_GPU}."
        )
    compares_images = cfg.LOSS.OBJECTIVE == "cmd" and cfg.CMD.LT in COMPARING
    if compares_images and cfg.TRAIN.BATCH_SIZE_PER_GPU < 2:
        raise InputError(
            f"CMD.LT {cfg.CMD.LT} compares images of a batch: TRAIN.BATCH_SIZE_PER_GPU "
            f"must be at least 2, not {cfg.TRAIN.BATCH_SIZE_PER_GPU} (or set CMD.LT none)."
        )
    if cfg.EVAL.KNN_EVERY and not (cfg.EVAL.KNN_TRAIN and cfg.EVAL.KNN_VAL):
        raise InputError("EVAL.KNN_EVERY needs EVAL.KNN_TRAIN and EVAL.KNN_VAL: two folders.")


def _check_crops(cfg: Node) -> None:
    aug = cfg.AUG
    for key, count in (
        ("GLOBAL_CROPS_SCALE", 2),
        ("LOCAL_CROPS_SCALE", 2),
        ("COLOR_JITTER", 4),
        ("BLUR_PROB", 3),
    ):
        if len(aug[key]) != count:
            raise InputError(f"AUG.{key} must have {count} values, not {aug[key]}.")
    for key in ("GLOBAL_CROPS_SCALE", "LOCAL_CROPS_SCALE"):
        low, high = aug[key]
        if not 0 < low <= high <= 1:
            raise InputError(f"AUG.{key} must rise between 0 and 1, not {aug[key]}.")
    if min(aug.COLOR_JITTER) < 0 or aug.COLOR_JITTER[3] > 0.5:
        raise InputError(
            f"AUG.COLOR_JITTER must be at least 0 and its hue at most 0.5, not {aug.COLOR_JITTER}."
        )
    if not all(0 <= p <= 1 for p in aug.BLUR_PROB):
        raise InputError(f"AUG.BLUR_PROB must lie between 0 and 1, not {aug.BLUR_PROB}.")
    for key in ("LOCAL_CROPS_NUMBER", "LOCAL_CROPS_SIZE"):
        if not all(isinstance(v, int) and v >= 0 for v in aug[key]):
            raise InputError(f"AUG.{key} must be whole numbers, not {aug[key]}.")
    counts, sizes = aug.LOCAL_CROPS_NUMBER, aug.LOCAL_CROPS_SIZE
    if sum(counts) and min(sizes, default=0) < 1:
        raise InputError(f"AUG.LOCAL_CROPS_SIZE must be positive, not {sizes}.")
    if sum(counts) and len(counts) != len(sizes):
        raise InputError(
            f"AUG.LOCAL_CROPS_NUMBER {counts} and AUG.LOCAL_CROPS_SIZE {sizes} must be equally "
            f"long: one number for each size."
        )


def local_crops(cfg: Node) -> list[tuple[int, int]]:
    """(number, size in pixels) of each kind of local crop; empty for none."""
    pairs = zip(cfg.AUG.LOCAL_CROPS_NUMBER, cfg.AUG.LOCAL_CROPS_SIZE, strict=False)
    return [(number, size) for number, size in pairs if number]


def crops_on_device(cfg: Node) -> bool:
    """Whether whole batches are cropped on the device: what DATA.CROPS auto means, too."""
    return cfg.DATA.CROPS == "device" or cfg.DATA.CACHE != "none"


def eval_size(cfg: Node) -> int:
    """Pixels of an evaluation's centre crop: EVAL.SIZE, else the run's global crops'."""
    return cfg.EVAL.SIZE or cfg.AUG.GLOBAL_CROPS_SIZE


def _check_schedules(cfg: Node) -> None:
    for key in ("TRAIN.WARMUP_EPOCHS", "LOSS.WARMUP_TEACHER_TEMP_EPOCHS"):
        if get(cfg, key) > cfg.TRAIN.EPOCHS:
            raise InputError(
                f"{key} {get(cfg, key)} is longer than the run of {cfg.TRAIN.EPOCHS} epochs "
                f"(TRAIN.EPOCHS). Shorten the one or lengthen the other."
            )
