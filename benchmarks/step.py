r"""Time, memory and arithmetic of one training step, data excluded.

    OMP_NUM_THREADS=2 python -m benchmarks.step --objective esvit --batch 4 \
        --contestants fp32 bf16 --reference PATH_OF_ESVIT --output benchmarks/results/...

Each contestant is a precision, with "+compile" behind it for torch.compile; with --reference,
the public EsViT or CMD checkout there is one more, in float32 on the CPU and with its own fp16
on a GPU. Every one has a process of its own; they take their steps in turn. The share of the
ceiling is the arithmetic of a step, counted by torch, over what the fastest matrix product of
that precision does on the same device in the same time.
"""

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.own_step import count_flops, options
from benchmarks.turns import ROOT, Contestant, take_turns
from utils.errors import InputError, run_script

REFERENCE = "reference"


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    common.add_network_options(parser)
    words = "precisions, perhaps with +compile: fp32, bf16, fp16, bf16+compile, ..."
    parser.add_argument("--contestants", nargs="+", default=["fp32"], help=words)
    parser.add_argument("--reference", type=Path, help="a public EsViT or CMD checkout")
    parser.add_argument("--profile", action="store_true", help="tell where each one's time goes")
    parser.add_argument("--warm_up", type=int, default=2, help="steps that do not count")
    parser.add_argument("--steps", type=common.positive, default=5, help="the median counts")
    common.add_crop_options(parser, batch=64 if common.device() == "cuda" else 4)
    return parser.parse_args()


def start(args: argparse.Namespace) -> list[Contestant]:
    """A process for each contestant; InputError, before any is started, where one cannot be."""
    commands = {}
    for name in args.contestants:
        settings = common.settings_of(args, name)
        options(settings)
        commands[name] = common.own_step_command(settings)
    if args.reference:
        if not (args.reference / "main_esvit.py").is_file():
            raise InputError(f"--reference: {args.reference} holds no main_esvit.py")
        *_, words = common.own_step_command(common.settings_of(args, "fp32"))
        script = str(ROOT / "benchmarks" / "reference_step.py")
        commands[REFERENCE] = [sys.executable, script, str(args.reference.resolve()), words]
    return [Contestant(name, command) for name, command in commands.items()]


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Figures of each contestant by its name."""
    contestants = start(args)
    take_turns(contestants, args.warm_up, args.steps)
    figures = {}
    for contestant in contestants:
        seconds = statistics.median(contestant.seconds)
        operators = {"operators": contestant.profile()} if args.profile else {}
        figures[contestant.name] = {
            "milliseconds": 1e3 * seconds,
            "images_per_second": args.batch / seconds,
            "peak_memory_gib": contestant.finish(),
            "all_milliseconds": [1e3 * s for s in contestant.seconds],
            **operators,
        }
    for name in args.contestants:
        flops = count_flops(common.settings_of(args, name))
        peak = common.matmul_peak(common.device(), name.split("+")[0], args.threads)
        figures[name] |= {
            "gflop_per_image": flops / args.batch / 1e9,
            "matmul_peak_tflops": peak / 1e12,
            "share_of_ceiling": flops / peak / figures[name]["milliseconds"] * 1e3,
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
    figures = measure(args)
    for name, found in figures.items():
        print(line(name, found))
        for operator in found.get("operators", []):
            print("  {operator:45.45} {milliseconds:8.1f} ms {calls:6d} calls".format(**operator))
    remarks = [
        "Medians. Contestants have a process each and take steps in turn; drawn crops, no "
        "loading of data.",
        "Peak memory: of the whole process after the warm-up on a CPU, allocated on a GPU.",
    ]
    if args.reference:
        remarks.append("The reference is a public checkout, as it is.")
    what = f"one training step, {common.network_in_words(args)}"
    common.write_report(args, what, figures, remarks)


if __name__ == "__main__":
    run_script(main)
