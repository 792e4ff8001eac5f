"""Time, memory and arithmetic of one training step, data excluded.

    OMP_NUM_THREADS=2 python -m benchmarks.step --objective esvit --batch 4 \
        --contestants fp32 bf16 --reference PATH_OF_ESVIT --output benchmarks/results/...

Each contestant is a precision, with "+compile" behind it for torch.compile; with --reference,
the public EsViT or CMD checkout there is one more, in float32 on the CPU and with its own fp16
on a GPU. Every one has a process of its own; they take their steps in turn. The share of the
ceiling is the arithmetic of a step, counted by torch, over what the fastest matrix product of
that precision does on the same device in the same time.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import device_name, matmul_peak, write_report
from benchmarks.own_step import count_flops
from benchmarks.turns import ROOT, Contestant, take_turns
from models.registry import ARCHITECTURES
from utils.errors import InputError, run_script
from utils.options import CHOICES

REFERENCE = "reference"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=CHOICES["LOSS.OBJECTIVE"], default="cmd")
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="swin_tiny")
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--prototypes", type=int, default=65536, help="K")
    parser.add_argument("--global_size", type=int, default=224, help="pixels, two crops")
    parser.add_argument("--local_crops", type=int, default=8, help="number of local crops")
    parser.add_argument("--local_size", type=int, default=96, help="pixels")
    parser.add_argument(
        "--contestants", nargs="+", default=["fp32"], help="fp32, bf16, fp16, bf16+compile, ..."
    )
    parser.add_argument("--reference", type=Path, help="a public EsViT or CMD checkout")
    parser.add_argument("--warm_up", type=int, default=2, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=5, help="steps; the median counts")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU, for each contestant")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("options", nargs="*", help="further options of the run, KEY VALUE ...")
    return parser.parse_args()


def settings_of(args: argparse.Namespace, contestant: str) -> dict:
    """What a contestant's process needs to know, as plain data."""
    precision, *how = contestant.split("+")
    if precision not in CHOICES["TRAIN.PRECISION"] or how not in ([], ["compile"]):
        raise InputError(f"there is no contestant '{contestant}': give fp32, bf16+compile, ...")
    if len(args.options) % 2:
        raise InputError(f"options come as KEY VALUE pairs, not {' '.join(args.options)}")
    options = dict(zip(args.options[::2], args.options[1::2], strict=True))
    names = ("objective", "arch", "batch", "prototypes", "global_size", "local_crops", "local_size")
    return {
        **{name: getattr(args, name) for name in (*names, "threads")},
        "precision": precision,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "options": options | ({"TRAIN.COMPILE": True} if how else {}),
    }


def start(args: argparse.Namespace) -> list[Contestant]:
    """A process for each contestant."""
    started = []
    for name in args.contestants:
        words = json.dumps(settings_of(args, name))
        command = [sys.executable, "-m", "benchmarks.own_step", words]
        started.append(Contestant(name, command))
    if args.reference:
        if not (args.reference / "main_esvit.py").is_file():
            raise InputError(f"--reference: {args.reference} holds no main_esvit.py")
        words = json.dumps(settings_of(args, "fp32"))
        script = str(ROOT / "benchmarks" / "reference_step.py")
        command = [sys.executable, script, str(args.reference.resolve()), words]
        started.append(Contestant(REFERENCE, command))
    return started


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Figures of each contestant by its name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contestants = start(args)
    take_turns(contestants, args.warm_up, args.steps)
    figures = {}
    for contestant in contestants:
        seconds = statistics.median(contestant.seconds)
        figures[contestant.name] = {
            "milliseconds": 1e3 * seconds,
            "images_per_second": args.batch / seconds,
            "peak_memory_gib": contestant.finish(),
            "all_milliseconds": [1e3 * s for s in contestant.seconds],
        }
    plain = settings_of(args, "fp32")
    flops = count_flops(plain | {"options": plain["options"]})
    for name in args.contestants:
        peak = matmul_peak(device, name.split("+")[0], args.threads)
        share = flops / peak / figures[name]["milliseconds"] * 1e3
        figures[name] |= {
            "gflop_per_image": flops / args.batch / 1e9,
            "matmul_peak_tflops": peak / 1e12,
            "share_of_ceiling": share,
        }
    if args.reference:
        rival = figures[REFERENCE]
        for name in args.contestants:
            own = figures[name]
            own["times_faster_than_reference"] = rival["milliseconds"] / own["milliseconds"]
            own["memory_over_reference"] = own["peak_memory_gib"] / rival["peak_memory_gib"]
    return figures


def line(name: str, figures: dict) -> str:
    """One contestant in one line."""
    text = (
        f"{name}: {figures['milliseconds']:.0f} ms, {figures['images_per_second']:.2f} images/s, "
        f"peak {figures['peak_memory_gib']:.2f} GiB"
    )
    if "share_of_ceiling" in figures:
        text += (
            f", {100 * figures['share_of_ceiling']:.0f} % of the ceiling "
            f"({figures['gflop_per_image']:.0f} GFLOP an image)"
        )
    if "times_faster_than_reference" in figures:
        text += (
            f"; {figures['times_faster_than_reference']:.2f} times the reference's speed, "
            f"{figures['memory_over_reference']:.2f} of its memory"
        )
    return text


def main() -> None:
    args = parse()
    began = time.perf_counter()
    figures = measure(args)
    for name in figures:
        print(line(name, figures[name]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {
        "what": f"one training step, {args.objective}, {args.arch}, batch {args.batch}, "
        f"2 x {args.global_size} + {args.local_crops} x {args.local_size} pixels, "
        f"K = {args.prototypes}",
        "device": device_name(device, args.threads),
        "seconds": round(time.perf_counter() - began, 1),
        "figures": figures,
        "remarks": [
            "Medians. Contestants have a process each and take steps in turn; drawn crops, no "
            "loading of data.",
            "Peak memory: of the whole process after the warm-up on a CPU, allocated on a GPU.",
        ],
    }
    if args.reference:
        report["remarks"].append(f"The reference is a checkout of {args.reference.name}, as it is.")
    write_report(args.output, "step", args.threads, report)


if __name__ == "__main__":
    run_script(main)
