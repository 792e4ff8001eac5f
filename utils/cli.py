"""The command line of each script: flags that set options, KEY VALUE pairs, and a few words beside.

A flag that was not typed overrides nothing; KEY VALUE pairs override all.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils import config, options
from utils.checkpoint import ENDINGS
from utils.config import Node
from utils.errors import InputError
from utils.options import OPTIONS, SECTIONS, Option


@dataclass(frozen=True)
class Face:
    """What one script's command line looks like.

    script: the name under which utils/options.py declares its flags.
    no_meaning: flags of EsViT that are accepted, and why they are ignored.
    extra: flags that set no option, with argparse's arguments; the script reads them itself.
    """

    script: str
    usage: str
    no_meaning: dict[str, str] = field(default_factory=dict)
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def flags(self) -> dict[str, Option]:
        """The option that each flag sets."""
        mine = [option for option in OPTIONS.values() if self.script in option.scripts]
        return {flag: option for option in mine for flag in option.flags}

    @property
    def yes_no(self) -> dict[str, Option]:
        """The option that each of EsViT's flags with a truth value sets."""
        mine = [option for option in OPTIONS.values() if self.script in option.scripts]
        return {option.yes_no[0]: option for option in mine if option.yes_no}


def _ignored(flags_by_reason: dict[str, str]) -> dict[str, str]:
    """{reason: flags with spaces between} -> {flag: reason}."""
    return {flag: why for why, flags in flags_by_reason.items() for flag in flags.split()}


# Flags of EsViT without a meaning here, and why.
_LAUNCH = {
    "torchrun and torch.distributed.launch give the address": "--dist_url",
    "images are read from folders": "--zip_mode --tsv_mode",
}
_PRETRAINING = {
    "a run resumes from its own checkpoint": "--start_epoch",
    "there is one sampler, shuffled every epoch": "--sampler",
    "the dense losses have no mixed targets": "--use_mixup",
    "there is no mixup": "--num_mixup_views --mixup --cutmix --cutmix-minmax --mixup-prob "
    "--mixup-switch-prob --mixup-mode",
    "there is no classifier": "--smoothing",
    "there is one augmentation, DINO's; its options are AUG.*": "--aug-opt --aa",
    "the option is AUG.COLOR_JITTER": "--color-jitter",
    "crops are bicubic": "--train-interpolation",
    "there is no random erasing": "--reprob --remode --recount --resplit",
}
_KNN = {"features go where the network is; --device cpu keeps off GPUs": "--use_cuda"}

PRETRAIN = Face(
    options.PRETRAIN,
    "--data_path FOLDER --output_dir FOLDER",
    _ignored(_LAUNCH | _PRETRAINING),
    extra={
        "--check": {
            "action": "store_true",
            "help": "tell what the run would meet, in words and as check.json; no training",
        }
    },
)
_USAGE = "--pretrained_weights FILE --data_path FOLDER --output_dir FOLDER"
KNN = Face(options.KNN, _USAGE, _ignored(_LAUNCH | _KNN))
RETRIEVAL = Face(options.RETRIEVAL, _USAGE, _ignored(_LAUNCH))
LINEAR = Face(options.LINEAR, _USAGE, _ignored(_LAUNCH))
TABLE = Face(
    options.TABLE,
    "--checkpoint FILE [FILE ...] --data_path FOLDER --output_dir FOLDER",
    extra={
        "--checkpoint": {
            "nargs": "+",
            "metavar": "FILE",
            "help": "checkpoints to compare, a row each",
        }
    },
)


@dataclass
class CommandLine:
    """A parsed command line.

    cfg: the options it makes. notes: lines to tell the user. typed: names of the options that
    the YAML file or the command line gave. extra: what the face's extra flags got.
    """

    cfg: Node
    notes: list[str] = field(default_factory=list)
    typed: set[str] = field(default_factory=set)
    extra: dict[str, Any] = field(default_factory=dict)


class Parser(argparse.ArgumentParser):
    """A wrong command line is an InputError: one line, not a page of usage."""

    def error(self, message: str) -> None:
        raise InputError(f"{message}. See --help.")


def at_least(least: float, kind: type = int) -> Callable[[str], float]:
    """The type of a flag that takes numbers from `least` up, read as those of options are."""

    def number(text: str) -> float:
        value = config.scalar(text)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or value < least:
            raise argparse.ArgumentTypeError(f"must be {config.KINDS[kind]} from {least}: {text}")
        return value

    return number


def _parser(description: str, face: Face) -> argparse.ArgumentParser:
    parser = Parser(
        usage=f"%(prog)s {face.usage} [flags] [KEY VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All options with their meaning: docs/configuration.md.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--cfg", help="YAML file of options, e.g. experiments/demo.yaml")
    for flag, option in face.flags.items():
        # Each flag its own destination: two flags may lead to one option.
        meaning = f"{option.meaning} [{option.name}]".replace("%", "%%")
        numbers = "+" if isinstance(option.default, list) else None
        parser.add_argument(flag, dest=flag, help=meaning, metavar="VALUE", nargs=numbers)
    for flag, option in face.yes_no.items():
        _, yes, no = option.yes_no
        meaning = f"true: {yes}, false: {no} [{option.name}]"
        parser.add_argument(flag, dest=flag, help=meaning, metavar="BOOL")
    for flag, arguments in face.extra.items():
        parser.add_argument(flag, dest=flag, **arguments)
    # torch.distributed.launch hands one of the two spellings to each process.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    for flag in face.no_meaning:
        parser.add_argument(flag, dest=flag, nargs="*", help=argparse.SUPPRESS)
    return parser


def parse(
    description: str, arguments: Sequence[str] | None = None, face: Face = PRETRAIN
) -> CommandLine:
    """Options from the command line: default < YAML < flag < KEY VALUE, checked.

    Raises InputError for an unknown flag, key, value, or a contradiction between flags.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    switches = [flag for flag, how in face.extra.items() if how.get("action") == "store_true"]
    arguments, pairs = split_pairs(arguments, switches)
    known, rest = _parser(description, face).parse_known_args(arguments)
    words = vars(known)
    if rest:
        flags = ["--cfg", *face.flags, *face.yes_no, *face.extra, *face.no_meaning]
        near = difflib.get_close_matches(rest[0], flags, n=1)
        hint = f" Did you mean {near[0]}?" if near else " See --help."
        raise InputError(f"unknown argument '{rest[0]}'.{hint}")

    meant = {flag: _meant(words[flag], o) for flag, o in face.yes_no.items() if flag in words}
    dense = "--use_dense_prediction"

    cfg = config.defaults()
    typed: dict[str, str] = {}  # option: who said so last
    if dense in meant:  # cmd or dino, unless another objective is named
        cfg.LOSS.OBJECTIVE = meant[dense]
    if "cfg" in words:
        for option in config.merge_file(cfg, words["cfg"]):
            typed[option] = f"{option} {config.get(cfg, option)} in {words['cfg']}"
    if "--use_fp16" in meant and "--precision" in words:
        raise InputError("--use_fp16 and --precision say the same thing: drop one of them.")
    given = [(o.name, words[flag], flag) for flag, o in face.flags.items() if flag in words]
    given += [("TRAIN.PRECISION", meant[flag], flag) for flag in ("--use_fp16",) if flag in meant]
    given += [(key, value, "") for key, value in pairs]
    for option, value, flag in given:
        config.put(cfg, option, value, flag or "command line")
        typed[option] = f"{flag or option} {value}"
    if dense in meant and (meant[dense] == "dino") != (cfg.LOSS.OBJECTIVE == "dino"):
        named = typed["LOSS.OBJECTIVE"]
        raise InputError(f"{dense} {words[dense]} contradicts {named}: drop one of them.")
    try:
        config.check(cfg)
    except InputError as error:
        # People look for what they typed: the message begins with the option.
        said = typed.get(str(error).split(" ", 1)[0], "").split(" ", 1)[0]
        raise InputError(f"{said}: {error}" if said in face.flags else str(error)) from None
    notes = [
        f"{flag} has no meaning here and is ignored: {why}."
        for flag, why in face.no_meaning.items()
        if flag in words
    ]
    extra = {flag: words[flag] for flag in face.extra if flag in words}
    return CommandLine(cfg, notes, set(typed), extra)


def split_pairs(
    arguments: list[str], switches: Collection[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Take the KEY VALUE pairs out: argparse cannot, a flag with nargs='+' would swallow them.

    An option's exact name always is a key. Another word is one, if a wrong one, when it looks
    like SECTION.KEY or is in capitals, and is neither the value of the flag before it nor a file.
    switches: flags without a value.
    """
    rest: list[str] = []
    pairs: list[tuple[str, str]] = []
    place = 0
    while place < len(arguments):
        word = arguments[place]
        before = arguments[place - 1] if place else ""
        is_value = before.startswith("--") and "=" not in before and before not in switches
        head, dot, _ = word.partition(".")
        looks_like_key = bool(dot and head) and (head.upper() in SECTIONS or word.isupper())
        if word not in OPTIONS and (not looks_like_key or is_value or _is_file(word)):
            rest.append(word)
            place += 1
            continue
        if place + 1 == len(arguments):
            raise InputError(f"the option {word} at the end of the line lacks a value.")
        pairs.append((word, arguments[place + 1]))
        place += 2
    return rest, pairs


def _is_file(word: str) -> bool:
    """Of weights by its ending, there or not; any other where it is there."""
    return word.endswith(ENDINGS) or os.path.exists(word)


def _meant(text: str, option: Option) -> str:
    """The option's value by EsViT's flag with a truth value, such as fp16 for --use_fp16 true."""
    flag, yes, no = option.yes_no
    if text.lower() not in config.TRUTH:
        raise InputError(f"{flag} must be true or false, not '{text}'.")
    return yes if config.TRUTH[text.lower()] else no
