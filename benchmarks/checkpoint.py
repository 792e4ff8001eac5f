r"""What checkpoints cost a training: written in the loop, and beside it by a thread.

    OMP_NUM_THREADS=2 python -m benchmarks.checkpoint --batch 2 --global_size 64 --local_crops 2 \
        --local_size 32 --turns 7 --output benchmarks/results/...

One run takes turns: a step without a checkpoint, one after a checkpoint that was written in the
loop, and the steps after one that was handed to saving.py's thread, until it is written.
What a checkpoint takes from the training is the time of the call and what those steps take beyond
the turn's step without; from it follows the time between checkpoints at which that is 1 %.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks import common, own_step
from benchmarks.turns import synchronize
from engine.training.saving import CheckpointWriter
from utils import checkpoint
from utils.errors import run_script

NONE, IN_THE_LOOP, BY_A_THREAD = "none", "in the loop", "by a thread"
Found = TypeVar("Found")
SHARE = 0.01  # of the training's time that checkpoints may take


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    common.add_network_options(parser)
    common.add_contestant_option(parser)
    parser.add_argument("--turns", type=common.positive, default=9, help="(%(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="whose disk is written to"
    )
    common.add_crop_options(parser, batch=2)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """What a checkpoint takes from training, by each way of writing, in seconds."""
    settings = common.settings_of(args, args.contestant)
    run = own_step.pretraining(settings)
    batches = own_step.drawn_batches(run)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    writer = CheckpointWriter(folder)

    def step() -> None:
        run.step = 0  # the schedules end, and every turn may train the same step
        run.train_step(batches)
        synchronize(settings["device"])

    def steps_until_written() -> int:
        done = 0
        while done == 0 or writer.busy:
            step()
            done += 1
        return done

    turns = []
    try:
        for _ in range(1 + args.turns):  # the first one warms up, and fills the memory
            _, plain = seconds_of(step)
            _, loop_call = seconds_of(lambda: checkpoint.save_last(run.state(), folder))
            _, loop_step = seconds_of(step)
            _, thread_call = seconds_of(lambda: writer.save(run.state()))
            steps, thread_steps = seconds_of(steps_until_written)
            turns.append(
                {
                    NONE: {"step": plain},
                    IN_THE_LOOP: {"call": loop_call, "beyond": loop_step - plain},
                    BY_A_THREAD: {"call": thread_call, "beyond": thread_steps - steps * plain},
                }
            )
        size = (folder / checkpoint.LAST).stat().st_size
    finally:
        writer.close()
        shutil.rmtree(folder)
    return figures(turns[1:], size)


def seconds_of(work: Callable[[], Found]) -> tuple[Found, float]:
    """What it returns, and how long it took."""
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def figures(turns: list[dict[str, dict[str, float]]], size: int) -> dict[str, dict]:
    """The report's figures; medians over the turns."""
    steps = [turn[NONE]["step"] for turn in turns]
    report: dict[str, dict] = {
        NONE: {"seconds_of_a_step": statistics.median(steps), "all_seconds_of_a_step": steps}
    }
    for name in (IN_THE_LOOP, BY_A_THREAD):
        calls, beyond = ([turn[name][part] for turn in turns] for part in ("call", "beyond"))
        taken = statistics.median(call + more for call, more in zip(calls, beyond, strict=True))
        report[name] = {
            "seconds_taken": taken,
            "minutes_between_for_1_percent": max(0.0, taken) / SHARE / 60,
            "seconds_of_the_call": statistics.median(calls),
            "gib": size / 2**30,
            "all_seconds_of_the_call": calls,
            "all_seconds_of_steps_beyond": beyond,
        }
    whole, beside = (report[name]["seconds_taken"] for name in (IN_THE_LOOP, BY_A_THREAD))
    report[BY_A_THREAD]["share_of_in_the_loop"] = beside / whole
    return report


def main() -> None:
    args = parse()
    found = measure(args)
    for name in (IN_THE_LOOP, BY_A_THREAD):
        way = found[name]
        print(
            f"{name}: a checkpoint of {way['gib']:.2f} GiB takes {way['seconds_taken']:.2f} s from "
            f"training, 1 % at one in {way['minutes_between_for_1_percent']:.1f} minutes; the call "
            f"{way['seconds_of_the_call']:.2f} s"
        )
    what = f"the cost of checkpoints, {args.contestant}, {common.network_in_words(args)}"
    remarks = [
        f"Medians of {args.turns} turns, each beside its own step without a checkpoint.",
        "Where the training is on a CPU, the thread that writes takes part of its cores; on a "
        "GPU it takes cores that the training leaves free.",
        "The disk's own cache takes part: each file is flushed to the disk before it is renamed.",
    ]
    common.write_report(args, what, found, remarks)


if __name__ == "__main__":
    run_script(main)
