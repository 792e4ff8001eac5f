r"""End to end: images a second of real training, beside those of the step alone.

    OMP_NUM_THREADS=2 python -m benchmarks.train --data_path DATA/train --objective cmd \
        --batch 4 --workers 2 --ways workers ram --output benchmarks/results/...

One process trains one network as main_cmd.py does, by each way of feeding (benchmarks/feeding.py)
and on the same drawn crops again and again, which is the step alone. They take turns. In each turn
a way has a loader of its own, some steps that do not count and then a window of steps that do; the
median over the turns counts. The share is a way's images a second over those of the step alone.
"""

import argparse
import statistics

from benchmarks import common, own_step
from benchmarks.feeding import (
    Feeding,
    add_feeding_options,
    described,
    stored_images,
    whole_bursts,
    window,
)
from engine.training.step import Pretraining
from utils.errors import run_script

STEP_ALONE = "step alone"


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    common.add_network_options(parser)
    common.add_contestant_option(parser)
    add_feeding_options(parser)
    parser.add_argument(
        "--steps", type=common.positive, default=8, help="in a window (%(default)s)"
    )
    common.add_crop_options(parser, batch=4)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Figures of the step alone and of each way, by name."""
    settings = common.settings_of(args, args.contestant)
    rates: dict[str, list[float]] = {name: [] for name in (STEP_ALONE, *args.ways)}
    with stored_images(args) as paths:
        # First the images, whose errors are printed before any network is built.
        feedings = {way: Feeding(settings, way, paths[way], args) for way in args.ways}
        run = own_step.pretraining(settings)
        for _ in range(args.turns):
            for name, found in rates.items():
                found.append(turn(run, feedings.get(name), args))
    alone = statistics.median(rates[STEP_ALONE])
    figures = {}
    for name, found in rates.items():
        median = statistics.median(found)
        figures[name] = {"images_per_second": median, "all_images_per_second": found}
        if name in feedings:
            figures[name] |= {"share_of_step_alone": median / alone, **feedings[name].figures}
    return figures


def turn(run: Pretraining, feeding: Feeding | None, args: argparse.Namespace) -> float:
    """Images a second in one window of steps; without a feeding, of the step alone."""
    run.step = 0  # the schedules end, and every window may train the same steps
    workers = feeding.workers if feeding else 1
    warm_up, counted = (whole_bursts(steps, workers) for steps in (args.warm_up, args.steps))
    batches = feeding.batches() if feeding else own_step.drawn_batches(run)
    seconds, _ = window(lambda: run.train_step(batches), warm_up, counted)
    return counted * run.images_per_step / seconds


def line(name: str, found: dict) -> str:
    """One way in one line."""
    text = f"{name}: {found['images_per_second']:.2f} images/s"
    if "share_of_step_alone" in found:
        text += f", {100 * found['share_of_step_alone']:.0f} % of the step alone"
    return text


def main() -> None:
    args = parse()
    found = measure(args)
    for name in found:
        print(line(name, found[name]))
    what = f"training from images to steps, {args.contestant}, {described(args)}, "
    remarks = [
        f"Medians of {args.turns} windows; the step alone and the ways take turns.",
        "The files lie in the system's cache of the disk after the first turn.",
        "Where loader and step share the cores of a CPU, the share also says what the loader "
        "takes from the step.",
    ]
    common.write_report(args, what + common.network_in_words(args), found, remarks)


if __name__ == "__main__":
    run_script(main)
