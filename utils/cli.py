"""The command line: a thin face on the options of utils/config.py.

Flags carry the names that EsViT users type. A flag that was not typed overrides nothing;
trailing KEY VALUE pairs override all.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from utils import config
from utils.config import Node
from utils.errors import InputError

_NUMBERS = {"nargs": "+"}

# flag: (option, what it says in --help, further arguments of add_argument)
PRETRAIN_FLAGS: dict[str, tuple[str, str, dict]] = {
    "--arch": ("MODEL.ARCH", "backbone, e.g. swin_tiny, deit_small, resnet50", {}),
    "--patch_size": ("MODEL.PATCH_SIZE", "pixels a side", {}),
    "--out_dim": ("HEAD.OUT_DIM", "number of prototypes K", {}),
    "--norm_last_layer": ("HEAD.NORM_LAST_LAYER", "freeze the prototypes' magnitude", {}),
    "--use_bn_in_head": ("HEAD.USE_BN", "BatchNorm in the heads", {}),
    "--momentum_teacher": ("TRAIN.MOMENTUM_TEACHER", "EMA momentum at the start", {}),
    "--objective": ("LOSS.OBJECTIVE", "dino, esvit, cmd or released", {}),
    "--warmup_teacher_temp": ("LOSS.WARMUP_TEACHER_TEMP", "teacher temperature at epoch 0", {}),
    "--teacher_temp": ("LOSS.TEACHER_TEMP", "teacher temperature after its warm-up", {}),
    "--warmup_teacher_temp_epochs": ("LOSS.WARMUP_TEACHER_TEMP_EPOCHS", "epochs", {}),
    "--lambda1": ("CMD.LAMBDA1", "weight of the inter-level terms", {}),
    "--optimizer": ("TRAIN.OPTIMIZER", "adamw or sgd", {}),
    "--precision": ("TRAIN.PRECISION", "auto, fp32, bf16 or fp16", {}),
    "--weight_decay": ("TRAIN.WEIGHT_DECAY", "at the start", {}),
    "--weight_decay_end": ("TRAIN.WEIGHT_DECAY_END", "at the end", {}),
    "--clip_grad": ("TRAIN.CLIP_GRAD", "largest norm of a parameter's gradient; 0: off", {}),
    "--batch_size_per_gpu": ("TRAIN.BATCH_SIZE_PER_GPU", "images a process and micro-batch", {}),
    "--accum_steps": ("TRAIN.ACCUM_STEPS", "micro-batches to an optimizer step", {}),
    "--epochs": ("TRAIN.EPOCHS", "length of the run", {}),
    "--freeze_last_layer": ("TRAIN.FREEZE_LAST_LAYER", "epochs with prototypes held", {}),
    "--lr": ("TRAIN.BASE_LR", "learning rate at 256 images a step", {}),
    "--warmup_epochs": ("TRAIN.WARMUP_EPOCHS", "of the learning rate", {}),
    "--min_lr": ("TRAIN.MIN_LR", "learning rate at the end", {}),
    "--global_crops_scale": ("AUG.GLOBAL_CROPS_SCALE", "share of the area", _NUMBERS),
    "--local_crops_number": ("AUG.LOCAL_CROPS_NUMBER", "one number for each size", _NUMBERS),
    "--local_crops_size": ("AUG.LOCAL_CROPS_SIZE", "pixels", _NUMBERS),
    "--local_crops_scale": ("AUG.LOCAL_CROPS_SCALE", "share of the area", _NUMBERS),
    "--dataset": ("DATA.DATASET", "kind of data set", {}),
    "--data_path": ("DATA.PATH", "folder of training images", {}),
    "--num_workers": ("DATA.WORKERS", "loader processes for each training process", {}),
    "--pretrained_weights_ckpt": ("INIT.WEIGHTS", "checkpoint to start from, at epoch 0", {}),
    "--pretrained_weights": ("INIT.WEIGHTS", "the same", {}),
    "--checkpoint_key": ("INIT.CHECKPOINT_KEY", "which of its networks: teacher or student", {}),
    "--output_dir": ("OUTPUT_DIR", "the run's folder", {}),
    "--saveckp_freq": ("CKPT.KEEP_EVERY", "epochs between checkpoints kept for good", {}),
    "--seed": ("SEED", "of everything random", {}),
    "--device": ("DEVICE", "auto, cpu or cuda", {}),
    "--resume": ("RESUME", "auto, or force where the options differ", {}),
}

# EsViT's flags without a meaning here: accepted, and said so in a line.
NO_MEANING = {
    "--start_epoch": "a run resumes from its own checkpoint",
    "--dist_url": "torchrun and torch.distributed.launch give the address",
    "--zip_mode": "images are read from folders",
    "--tsv_mode": "images are read from folders",
    "--sampler": "there is one sampler, shuffled every epoch",
    "--use_mixup": "the dense losses have no mixed targets",
    "--num_mixup_views": "there is no mixup",
    "--mixup": "there is no mixup",
    "--cutmix": "there is no mixup",
    "--cutmix-minmax": "there is no mixup",
    "--mixup-prob": "there is no mixup",
    "--mixup-switch-prob": "there is no mixup",
    "--mixup-mode": "there is no mixup",
    "--smoothing": "there is no classifier",
    "--aug-opt": "there is one augmentation, DINO's; its options are AUG.*",
    "--color-jitter": "the option is AUG.COLOR_JITTER",
    "--aa": "there is one augmentation, DINO's; its options are AUG.*",
    "--train-interpolation": "crops are bicubic",
    "--reprob": "there is no random erasing",
    "--remode": "there is no random erasing",
    "--recount": "there is no random erasing",
    "--resplit": "there is no random erasing",
}


@dataclass
class CommandLine:
    """A parsed command line: the options it makes, and lines to tell the user."""

    cfg: Node
    notes: list[str] = field(default_factory=list)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message}. See --help.")


def _parser(description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s --data_path FOLDER --output_dir FOLDER [flags] [KEY VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All options with their meaning: docs/configuration.md.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--cfg", help="YAML file of options, e.g. experiments/demo.yaml")
    for flag, (option, meaning, arguments) in PRETRAIN_FLAGS.items():
        # Each flag its own destination: two flags may lead to one option.
        parser.add_argument(
            flag, dest=flag, help=f"{meaning} [{option}]", metavar="VALUE", **arguments
        )
    parser.add_argument(
        "--use_dense_prediction",
        metavar="BOOL",
        help="true: objective cmd, false: dino [LOSS.OBJECTIVE]",
    )
    parser.add_argument(
        "--use_fp16", metavar="BOOL", help="true: fp16, false: fp32 [TRAIN.PRECISION]"
    )
    # torch.distributed.launch hands one of the two spellings to each process.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    for flag in NO_MEANING:
        parser.add_argument(flag, dest=flag, nargs="*", help=argparse.SUPPRESS)
    return parser


def parse(description: str, arguments: Sequence[str] | None = None) -> CommandLine:
    """Options from the command line: default < YAML < flag < KEY VALUE, checked.

    Raises InputError for an unknown flag, key, value, or a contradiction between flags.
    """
    parser = _parser(description)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments, pairs = _split_pairs(arguments)
    known, rest = parser.parse_known_args(arguments)
    typed = vars(known)
    if rest:
        flags = [*PRETRAIN_FLAGS, *NO_MEANING, "--cfg", "--use_dense_prediction", "--use_fp16"]
        near = difflib.get_close_matches(rest[0], flags, n=1)
        hint = f" Did you mean {near[0]}?" if near else " See --help."
        raise InputError(f"unknown argument '{rest[0]}'.{hint}")

    cfg = config.defaults()
    told_objective = None
    if "cfg" in typed and "LOSS.OBJECTIVE" in config.merge_file(cfg, typed["cfg"]):
        told_objective = f"LOSS.OBJECTIVE {cfg.LOSS.OBJECTIVE} in {typed['cfg']}"
    for flag, (option, _, _) in PRETRAIN_FLAGS.items():
        if flag in typed:
            config.put(cfg, option, typed[flag], flag)
            if option == "LOSS.OBJECTIVE":
                told_objective = f"{flag} {typed[flag]}"
    if "use_fp16" in typed:
        if "--precision" in typed:
            raise InputError("--use_fp16 and --precision say the same thing: drop one of them.")
        fp16 = _bool("--use_fp16", typed["use_fp16"])
        config.put(cfg, "TRAIN.PRECISION", "fp16" if fp16 else "fp32", "--use_fp16")
    for key, value in pairs:
        config.put(cfg, key, value, "command line")
        if key == "LOSS.OBJECTIVE":
            told_objective = f"{key} {value}"
    if "use_dense_prediction" in typed:
        dense = _bool("--use_dense_prediction", typed["use_dense_prediction"])
        _apply_dense_prediction(cfg, dense, told_objective)
    for key in config.PATHS:
        config.put(cfg, key, os.path.expanduser(config.get(cfg, key)), key)
    config.check(cfg)
    notes = [
        f"{flag} has no meaning here and is ignored: {why}."
        for flag, why in NO_MEANING.items()
        if flag in typed
    ]
    return CommandLine(cfg, notes)


def _split_pairs(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take the KEY VALUE pairs out: argparse cannot, a flag with nargs='+' would swallow them.

    An option's exact name always is a key. Another word is one, if a wrong one, when it looks
    like SECTION.KEY in capitals and is not the value of the flag before it.
    """
    options = set(config.option_names())
    sections = {key.split(".")[0] for key in options if "." in key}
    rest: list[str] = []
    pairs: list[tuple[str, str]] = []
    place = 0
    while place < len(arguments):
        word = arguments[place]
        before = arguments[place - 1] if place else ""
        is_value = before.startswith("--") and "=" not in before
        head, dot, _ = word.partition(".")
        looks_like_key = bool(dot) and (head.upper() in sections or word.isupper())
        if word not in options and (is_value or not looks_like_key):
            rest.append(word)
            place += 1
            continue
        if place + 1 == len(arguments):
            raise InputError(f"the option {word} at the end of the line lacks a value.")
        pairs.append((word, arguments[place + 1]))
        place += 2
    return rest, pairs


def _bool(flag: str, text: str) -> bool:
    values = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if text.lower() not in values:
        raise InputError(f"{flag} must be true or false, not '{text}'.")
    return values[text.lower()]


def _apply_dense_prediction(cfg: Node, dense: bool, told: str | None) -> None:
    """--use_dense_prediction true means objective cmd, false dino.

    An objective that is named explicitly and is dense (or not) in the same way may stand.
    """
    name = cfg.LOSS.OBJECTIVE
    if told is None:
        cfg.LOSS.OBJECTIVE = "cmd" if dense else "dino"
    elif dense != (name != "dino"):
        raise InputError(
            f"--use_dense_prediction {str(dense).lower()} contradicts {told}: drop one of them."
        )
