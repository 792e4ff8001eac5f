"""Every option, once: its default, unit and meaning; and how a run's options are put together.

Precedence: KEY VALUE over flag over YAML over default (utils/cli.py has the flags). `check`
says in one sentence what cannot work, before anything runs.
"""

import contextlib
import difflib
import math
from pathlib import Path

import yaml
from yacs.config import CfgNode as Node

from utils.errors import InputError

_ = Node()

_.SEED = 0  # of initialisation, data order, augmentation and device-side randomness
_.OUTPUT_DIR = ""  # the run's folder: checkpoints, log.txt, config.yaml, TensorBoard events
_.DEVICE = "auto"  # auto (a GPU where there is one) | cpu | cuda
_.PRINT_FREQ = 10  # steps between two lines of the log; metrics are fetched only then
_.RESUME = "auto"  # auto (from OUTPUT_DIR if it holds a checkpoint) | force (though options differ)

_.MODEL = Node()  # the backbone
_.MODEL.ARCH = "swin_tiny"  # a name in models/registry.py
_.MODEL.EMBED_DIM = 0  # width of the first stage; 0: the architecture's own
_.MODEL.DEPTHS = []  # blocks a stage; []: the architecture's own
_.MODEL.NUM_HEADS = []  # attention heads a stage; []: the architecture's own
_.MODEL.WINDOW_SIZE = 7  # Swin's window, patches a side
_.MODEL.PATCH_SIZE = 0  # pixels a side; 0: the architecture's own (Swin 4, ViT 16)
_.MODEL.IMG_SIZE = 224  # pixels that windows and position embeddings are laid out for
_.MODEL.DROP_PATH = 0.1  # the student's stochastic depth at its last block; the teacher has none
_.MODEL.NUM_CLASSES = 0  # always 0: backbones have no classifier (EsViT's commands set it)

_.HEAD = Node()  # both DINO heads, and the pooling
_.HEAD.OUT_DIM = 65536  # K, prototypes
_.HEAD.HIDDEN_DIM = 2048  # width of the MLP
_.HEAD.BOTTLENECK_DIM = 256  # d, width of the embeddings
_.HEAD.LAYERS = 3  # linears in the MLP
_.HEAD.USE_BN = False  # BatchNorm in the MLP
_.HEAD.NORM_LAST_LAYER = True  # freeze the prototypes' magnitude at 1
_.HEAD.POOL_HIDDEN = 128  # hidden units of the MIL attention

_.LOSS = Node()  # objective and temperatures
_.LOSS.OBJECTIVE = "cmd"  # dino | esvit | cmd | released (losses/objective.py)
_.LOSS.STUDENT_TEMP = 0.1  # temperature of all student distributions
_.LOSS.WARMUP_TEACHER_TEMP = 0.04  # the teacher's temperature at the first epoch
_.LOSS.TEACHER_TEMP = 0.04  # and after the warm-up
_.LOSS.WARMUP_TEACHER_TEMP_EPOCHS = 0  # linear from the one to the other
_.LOSS.CENTER_MOMENTUM = 0.9  # of the EMA of the centres

_.CMD = Node()  # the inter-level terms; read by the objectives cmd and released (LAMBDA1)
_.CMD.LAMBDA1 = 0.3  # weight of L_S + L_T
_.CMD.LS = True  # whether L_S is on
_.CMD.LS_GRAD = "image"  # where L_S's gradient goes: image | both (image and bag)
_.CMD.LT = "diverse"  # form of L_T: diverse | contrast | cross | same | none
_.CMD.DIVERSE_K = 6  # bags in which a patch must recur, for LT diverse
_.CMD.REGION_WEIGHT = "uniform"  # weights of patches in L_R: uniform | mix (half attention)

_.DATA = Node()  # the images
_.DATA.DATASET = "folder"  # a name in datasets/fine_grained.py
_.DATA.PATH = ""  # its folder; labels are not used
_.DATA.WORKERS = 8  # loader processes for each training process; 0: in the training process

_.AUG = Node()  # multi-crop augmentation (datasets/multicrop.py)
_.AUG.GLOBAL_CROPS_SIZE = 224  # pixels
_.AUG.GLOBAL_CROPS_SCALE = [0.4, 1.0]  # share of the image's area
_.AUG.LOCAL_CROPS_NUMBER = [8]  # one entry for each local size; [] for none
_.AUG.LOCAL_CROPS_SIZE = [96]  # pixels
_.AUG.LOCAL_CROPS_SCALE = [0.05, 0.4]  # share of the image's area
_.AUG.COLOR_JITTER = [0.4, 0.4, 0.2, 0.1]  # brightness, contrast, saturation, hue
_.AUG.COLOR_JITTER_PROB = 0.8  # how often a crop is jittered
_.AUG.GRAY_PROB = 0.2  # how often a crop loses its colour
_.AUG.BLUR_PROB = [1.0, 0.1, 0.5]  # first global crop, second, local crops
_.AUG.SOLARIZE_PROB = 0.2  # second global crop

_.TRAIN = Node()  # length, batch, optimizer
_.TRAIN.EPOCHS = 100  # length of the run; the schedules stretch to it
_.TRAIN.BATCH_SIZE_PER_GPU = 64  # images for each process and micro-batch
_.TRAIN.ACCUM_STEPS = 1  # micro-batches to an optimizer step
_.TRAIN.OPTIMIZER = "adamw"  # adamw | sgd (momentum 0.9)
_.TRAIN.BASE_LR = 0.0005  # at 256 images a step; the peak is BASE_LR * images / 256
_.TRAIN.MIN_LR = 1e-6  # at the end of the cosine
_.TRAIN.WARMUP_EPOCHS = 10  # linear, from 0
_.TRAIN.WEIGHT_DECAY = 0.04  # at the start; not on biases and 1-D parameters
_.TRAIN.WEIGHT_DECAY_END = 0.4  # at the end of its cosine
_.TRAIN.MOMENTUM_TEACHER = 0.996  # of the EMA at the start; rises to 1 on a cosine
_.TRAIN.CLIP_GRAD = 3.0  # largest norm of each parameter's gradient on its own; 0: no clipping
_.TRAIN.FREEZE_LAST_LAYER = 1  # epochs in which the prototypes do not move
_.TRAIN.PRECISION = "auto"  # auto (bf16 on a GPU that has it, fp16 on another, fp32 on CPU) |
# fp32 | bf16 | fp16
_.TRAIN.TIMEOUT_MINUTES = 30.0  # after which a process that waits for another gives up

_.INIT = Node()  # starting weights
_.INIT.WEIGHTS = ""  # someone's checkpoint to start student and teacher from, at epoch 0
_.INIT.CHECKPOINT_KEY = "teacher"  # which of its networks: teacher | student

_.CKPT = Node()  # checkpoints
_.CKPT.EVERY_EPOCHS = 1  # how often the last checkpoint is written
_.CKPT.KEEP_EVERY = 20  # epochs between checkpoints that are kept for good; 0: only the last

_.EVAL = Node()  # tests during pretraining
_.EVAL.KNN_EVERY = 0  # epochs between k-NN tests of the teacher; 0: none
_.EVAL.KNN_TRAIN = ""  # folder with class subfolders: the gallery
_.EVAL.KNN_VAL = ""  # folder with class subfolders: the queries
_.EVAL.KNN_K = 20  # neighbours
_.EVAL.SIZE = 224  # pixels of the centre crop; the image is first resized to 256/224 of it

DEFAULTS = _

# Options that may differ between a checkpoint and the command that resumes from it.
RESUME_MAY_DIFFER = (
    "OUTPUT_DIR",
    "DEVICE",
    "PRINT_FREQ",
    "RESUME",
    "DATA.PATH",
    "DATA.WORKERS",
    "TRAIN.EPOCHS",
    "TRAIN.TIMEOUT_MINUTES",
    "TRAIN.BATCH_SIZE_PER_GPU",  # only their product with the processes counts: checked apart
    "TRAIN.ACCUM_STEPS",
    "INIT.WEIGHTS",
    "INIT.CHECKPOINT_KEY",
    "CKPT.EVERY_EPOCHS",
    "CKPT.KEEP_EVERY",
    "EVAL.KNN_EVERY",
    "EVAL.KNN_TRAIN",
    "EVAL.KNN_VAL",
    "EVAL.KNN_K",
    "EVAL.SIZE",
)

# The values of options that are names.
CHOICES = {
    "DEVICE": ("auto", "cpu", "cuda"),
    "RESUME": ("auto", "force"),
    "LOSS.OBJECTIVE": ("dino", "esvit", "cmd", "released"),
    "CMD.LS_GRAD": ("image", "both"),
    "CMD.LT": ("diverse", "contrast", "cross", "same", "none"),
    "CMD.REGION_WEIGHT": ("uniform", "mix"),
    "TRAIN.OPTIMIZER": ("adamw", "sgd"),
    "TRAIN.PRECISION": ("auto", "fp32", "bf16", "fp16"),
    "INIT.CHECKPOINT_KEY": ("teacher", "student"),
}

# key: (lowest, highest); None for no bound.
_RANGES = {
    "SEED": (0, None),
    "PRINT_FREQ": (1, None),
    "MODEL.EMBED_DIM": (0, None),
    "MODEL.WINDOW_SIZE": (1, None),
    "MODEL.PATCH_SIZE": (0, None),
    "MODEL.IMG_SIZE": (1, None),
    "MODEL.DROP_PATH": (0, 0.999),
    "MODEL.NUM_CLASSES": (0, 0),
    "HEAD.OUT_DIM": (2, None),
    "HEAD.HIDDEN_DIM": (1, None),
    "HEAD.BOTTLENECK_DIM": (1, None),
    "HEAD.LAYERS": (1, None),
    "HEAD.POOL_HIDDEN": (1, None),
    "LOSS.STUDENT_TEMP": (1e-4, None),
    "LOSS.WARMUP_TEACHER_TEMP": (1e-4, None),
    "LOSS.TEACHER_TEMP": (1e-4, None),
    "LOSS.WARMUP_TEACHER_TEMP_EPOCHS": (0, None),
    "LOSS.CENTER_MOMENTUM": (0, 1),
    "CMD.LAMBDA1": (0, None),
    "CMD.DIVERSE_K": (1, None),
    "DATA.WORKERS": (0, None),
    "AUG.GLOBAL_CROPS_SIZE": (1, None),
    "AUG.COLOR_JITTER_PROB": (0, 1),
    "AUG.GRAY_PROB": (0, 1),
    "AUG.SOLARIZE_PROB": (0, 1),
    "TRAIN.EPOCHS": (1, None),
    "TRAIN.BATCH_SIZE_PER_GPU": (1, None),
    "TRAIN.ACCUM_STEPS": (1, None),
    "TRAIN.BASE_LR": (0, None),
    "TRAIN.MIN_LR": (0, None),
    "TRAIN.WARMUP_EPOCHS": (0, None),
    "TRAIN.WEIGHT_DECAY": (0, None),
    "TRAIN.WEIGHT_DECAY_END": (0, None),
    "TRAIN.MOMENTUM_TEACHER": (0, 1),
    "TRAIN.CLIP_GRAD": (0, None),
    "TRAIN.FREEZE_LAST_LAYER": (0, None),
    "TRAIN.TIMEOUT_MINUTES": (0.01, None),
    "CKPT.EVERY_EPOCHS": (1, None),
    "CKPT.KEEP_EVERY": (0, None),
    "EVAL.KNN_EVERY": (0, None),
    "EVAL.KNN_K": (1, None),
    "EVAL.SIZE": (1, None),
}


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
    if isinstance(value, str) and isinstance(default, float):
        # YAML 1.1 reads 1e-4 as a string: it wants 1.0e-4.
        with contextlib.suppress(ValueError):
            value = float(value)
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
        value = list(value) if isinstance(value, list | tuple) else [value]
        value = [_scalar(v) if isinstance(v, str) else v for v in value]
        fits = all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    else:
        fits = isinstance(value, str)
    if not fits:
        kind = {bool: "true or false", float: "a number", int: "a whole number"}.get(
            type(default), "a list of numbers" if isinstance(default, list) else "a text"
        )
        raise InputError(f"{source}: {key} must be {kind}, not {value!r}.")
    return value


def _scalar(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def merge_file(cfg: Node, path: str | Path) -> list[str]:
    """Lay a YAML file's options over `cfg`; returns their names.

    InputError for a bad file, key or value.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"--cfg: there is no file {path}.")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a YAML file: {reason}.") from None
    except OSError as error:
        raise InputError(f"--cfg: {path} cannot be read ({error.strerror}).") from None
    if tree is None:
        return []
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold options as SECTION: KEY: value.")
    return _merge_tree(cfg, tree, "", str(path))


def _merge_tree(cfg: Node, tree: dict, prefix: str, source: str) -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            names += _merge_tree(cfg, value, f"{name}.", source)
        elif value is None and isinstance(DEFAULTS.get(name), Node):
            continue  # a section with all its lines commented out
        else:
            put(cfg, name, value, source)
            names.append(name)
    return names


def to_dict(cfg: Node) -> dict:
    """Plain nested data, for a checkpoint or a file."""
    return {k: to_dict(v) if isinstance(v, Node) else v for k, v in cfg.items()}


def from_dict(tree: dict, source: str = "the checkpoint") -> Node:
    """Options of a stored run; one that no longer exists is an InputError."""
    cfg = defaults()
    _merge_tree(cfg, tree, "", source)
    return cfg


def write(cfg: Node, path: str | Path) -> None:
    """The resolved options as YAML."""
    Path(path).write_text(yaml.safe_dump(to_dict(cfg), sort_keys=False))


def differing(a: Node, b: Node, ignore: tuple[str, ...] = ()) -> list[str]:
    """Names of options whose values differ, but for the ignored."""
    return [key for key in option_names() if key not in ignore and get(a, key) != get(b, key)]


PATHS = ("OUTPUT_DIR", "DATA.PATH", "INIT.WEIGHTS", "EVAL.KNN_TRAIN", "EVAL.KNN_VAL")


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
    for key, (low, high) in _RANGES.items():
        value = get(cfg, key)
        if not math.isfinite(value):
            raise InputError(f"{key} must be a finite number, not {value}.")
        if low is not None and value < low:
            raise InputError(f"{key} must be at least {low}, not {value}.")
        if high is not None and value > high:
            raise InputError(f"{key} must be at most {high}, not {value}.")
    _check_crops(cfg)
    _check_schedules(cfg)
    compares_images = cfg.LOSS.OBJECTIVE == "cmd" and cfg.CMD.LT in ("diverse", "contrast")
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


def _check_schedules(cfg: Node) -> None:
    for key in ("TRAIN.WARMUP_EPOCHS", "LOSS.WARMUP_TEACHER_TEMP_EPOCHS"):
        if get(cfg, key) > cfg.TRAIN.EPOCHS:
            raise InputError(
                f"{key} {get(cfg, key)} is longer than the run of {cfg.TRAIN.EPOCHS} epochs "
                f"(TRAIN.EPOCHS). Shorten the one or lengthen the other."
            )
