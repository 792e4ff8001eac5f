"""What the measurements share: options of a step, its settings, and the report of each.

A contestant is a precision, with "+compile" behind it for torch.compile, and "+KEY=VALUE" for an
option of its own: fp32, bf16+compile, bf16+TRAIN.CHECKPOINTING=true.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch

from benchmarks.turns import synchronize
from models.registry import ARCHITECTURES
from utils.cli import Parser, at_least
from utils.errors import InputError
from utils.files import write_json
from utils.options import OPTIONS

positive = at_least(1)  # an argument's type
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CROPS = ("batch", "global_size", "local_crops", "local_size", "threads")
_NETWORK = ("objective", "arch", "prototypes")


# Options


def parser(description: str) -> argparse.ArgumentParser:
    """A parser whose errors are InputErrors; the description is printed as it stands.

    What it parses has `began`, the time, for `write_report`.
    """
    made = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.set_defaults(began=time.perf_counter())
    return made


def _writable(text: str) -> Path:
    """A file to be written after the measurement, so its folder must be there before."""
    path = Path(text)
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write into")
    return path


def add_crop_options(parser: argparse.ArgumentParser, batch: int) -> None:
    """What every measurement of crops or steps asks: batch, crops, threads, output, KEY VALUE."""
    parser.add_argument("--batch", type=positive, default=batch, help="images a step (%(default)s)")
    parser.add_argument(
        "--global_size", type=positive, default=224, help="pixels, two crops (%(default)s)"
    )
    parser.add_argument(
        "--local_crops", type=int, default=8, help="local crops an image (%(default)s)"
    )
    parser.add_argument("--local_size", type=positive, default=96, help="pixels (%(default)s)")
    parser.add_argument(
        "--threads", type=positive, default=2, help="of the CPU, for each (%(default)s)"
    )
    parser.add_argument("--output", type=_writable, help="JSON file to write")
    parser.add_argument(
        "options",
        nargs="*",
        help="further options of the run, KEY VALUE ..., after -- if a list stands before",
    )


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """What every measurement of steps asks about networks and loss."""
    parser.add_argument("--objective", choices=OPTIONS["LOSS.OBJECTIVE"].choices, default="cmd")
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="swin_tiny")
    parser.add_argument("--prototypes", type=positive, default=65536, help="K (%(default)s)")


def add_contestant_option(parser: argparse.ArgumentParser) -> None:
    """For measurements of one contestant."""
    default = "bf16" if device() == "cuda" else "fp32"
    words = "precision, perhaps with +compile: fp32, bf16+compile, ... (%(default)s)"
    parser.add_argument("--contestant", default=default, help=words)


def settings_of(args: argparse.Namespace, contestant: str) -> dict:
    """What a contestant's process needs to know, as plain data (see benchmarks.own_step).

    Raises InputError for a contestant that there is not, and for options that are no pairs.
    """
    precision, *how = contestant.split("+")
    own = ["TRAIN.COMPILE=true" if word == "compile" else word for word in how]
    if precision not in DTYPES or not all("=" in word for word in own):
        raise InputError(f"there is no contestant '{contestant}': give fp32, bf16+compile, ...")
    if len(args.options) % 2:
        raise InputError(f"options come as KEY VALUE pairs, not {' '.join(args.options)}")
    options = dict(zip(args.options[::2], args.options[1::2], strict=True))
    return {
        **{name: getattr(args, name) for name in (*_NETWORK, *_CROPS)},
        "precision": precision,
        "device": device(),
        "options": options | dict(word.split("=", 1) for word in own),
    }


def in_words(args: argparse.Namespace) -> str:
    """Batch and crops, for a report."""
    local = f"{args.local_crops} x {args.local_size}"
    return f"batch {args.batch}, 2 x {args.global_size} + {local} pixels"


def network_in_words(args: argparse.Namespace) -> str:
    """Objective, network, batch, crops and K, for a report."""
    return f"{args.objective}, {args.arch}, {in_words(args)}, K = {args.prototypes}"


def own_step_command(settings: dict) -> list[str]:
    """The command of a process that takes steps of these settings."""
    return [sys.executable, "-m", "benchmarks.own_step", json.dumps(settings)]


# The machine


def device() -> str:
    """Where all is measured: cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def processor() -> str:
    """The CPU's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def device_name(device: str, threads: int) -> str:
    """What a figure was measured on, for a report."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, host {processor()}"
    return f"{processor()}, {threads} threads, no GPU"


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version()}


def matmul_peak(device: str, precision: str, threads: int) -> float:
    """The fastest square product of this precision on this device, in FLOP/s."""
    torch.set_num_threads(threads)
    size, repeats = (8192, 20) if device == "cuda" else (3072, 5)
    left, right = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


# The report


def write_report(
    args: argparse.Namespace, what: str, figures: dict, remarks: list[str], **more: object
) -> None:
    """Write a measurement to args.output as JSON, with what benchmarks/README.md asks of each.

    args: as `parser` gives them; without an output nothing is written. more: further entries, or
    others in the place of these.
    """
    if args.output is None:
        return
    module, command = Path(sys.argv[0]).stem, shlex.join(sys.argv[1:])
    command = f"OMP_NUM_THREADS={args.threads} python -m benchmarks.{module} {command}".rstrip()
    report = {
        "what": what,
        "date": datetime.date.today().isoformat(),
        "device": device_name(device(), args.threads),
        "versions": versions(),
        "commands": [command],
        "seconds": round(time.perf_counter() - args.began, 1),
        "figures": figures,
        "remarks": remarks,
    }
    write_json(args.output, report | more, "report")
