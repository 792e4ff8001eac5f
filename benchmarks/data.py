r"""The input side alone: images a second that arrive as crops on the device, by way of feeding.

    OMP_NUM_THREADS=2 python -m benchmarks.data --data_path DATA/train --workers 2 \
        --output benchmarks/results/...

benchmarks/feeding.py says what ways there are. They take turns. In each turn a way has a loader
of its own, some batches that do not count and then a window of batches that do; the median over
the turns counts. Nothing uses the crops. The time of cores is that of this process and the
loader's, and on a GPU includes waiting for it at a window's end.
"""

import argparse
import statistics

import torch

from benchmarks import common
from benchmarks.feeding import (
    Feeding,
    add_feeding_options,
    described,
    stored_images,
    whole_bursts,
    window,
)
from utils.errors import run_script


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    add_feeding_options(parser)
    parser.add_argument(
        "--batches", type=common.positive, default=8, help="in a window (%(default)s)"
    )
    common.add_crop_options(parser, batch=32)
    # No network is built and no loss: what their options are is all one.
    parser.set_defaults(objective="dino", arch="vit_small", prototypes=64)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Figures of each way by its name."""
    torch.set_num_threads(args.threads)
    settings = common.settings_of(args, "fp32")
    windows: dict[str, list[tuple[float, float]]] = {way: [] for way in args.ways}
    with stored_images(args) as paths:
        feedings = {way: Feeding(settings, way, paths[way], args) for way in args.ways}
        for _ in range(args.turns):
            for way, feeding in feedings.items():
                windows[way].append(turn(feeding, args))
        return {way: figures(feedings[way], windows[way]) for way in args.ways}


def turn(feeding: Feeding, args: argparse.Namespace) -> tuple[float, float]:
    """Images a second in one window of a fresh loader, and milliseconds of a core an image."""
    warm_up, counted = (
        whole_bursts(batches, feeding.workers) for batches in (args.warm_up, args.batches)
    )
    batches = feeding.batches()
    seconds, cores = window(lambda: feeding.take_crops(batches), warm_up, counted)
    images = counted * feeding.cfg.TRAIN.BATCH_SIZE_PER_GPU
    return images / seconds, 1e3 * cores / images


def figures(feeding: Feeding, windows: list[tuple[float, float]]) -> dict:
    """One way's part of the report."""
    rates, cores = zip(*windows, strict=True)
    return {
        "images_per_second": statistics.median(rates),
        "core_milliseconds_per_image": statistics.median(cores),
        "all_images_per_second": rates,
        **feeding.figures,
    }


def line(way: str, found: dict) -> str:
    """One way in one line."""
    text = (
        f"{way}: {found['images_per_second']:.0f} images/s, "
        f"{found['core_milliseconds_per_image']:.2f} ms of a core an image"
    )
    if "kept_gib" in found:
        text += f"; {found['kept_gib']:.3f} GiB kept, filled in {found['fill_seconds']:.1f} s"
    return text


def main() -> None:
    args = parse()
    found = measure(args)
    for way in args.ways:
        print(line(way, found[way]))
    what = f"images as crops on the device, {described(args)}, {common.in_words(args)}"
    remarks = [
        f"Medians of {args.turns} windows of a fresh loader each; the ways take turns.",
        "The files lie in the system's cache of the disk after the first turn.",
        "Kept: the decoded pixels' bytes. On a CPU `device` is `ram`.",
    ]
    common.write_report(args, what, found, remarks)


if __name__ == "__main__":
    run_script(main)
