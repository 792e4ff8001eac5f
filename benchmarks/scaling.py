"""How time and peak memory of a step grow with batch, prototypes, local crops and image size.

    OMP_NUM_THREADS=2 python -m benchmarks.scaling --objective cmd --batch 2 \
        --output benchmarks/results/...

One axis at a time around a base setting, each point in a process of its own; a picture of four
panels is written beside the JSON. Along the axis of image size the local crops keep their ratio to
the global ones. Prototypes are K-sized by nature where a step holds, for each head and in float32,
weight_v and W [K, d] of student and teacher, the gradients of the student's two and both moments
of its weight_v: the rest of the memory should not depend on K.
"""

import argparse
import statistics
import time
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from benchmarks import common
from benchmarks.own_step import options
from benchmarks.turns import Contestant, take_turns
from engine import build
from utils.errors import InputError, run_script
from utils.files import replacing

K_SIZED = (
    "student weight_v",
    "student W",
    "gradient of W",
    "gradient of weight_v",
    "first moment of weight_v",
    "second moment of weight_v",
    "teacher weight_v",
    "teacher W",
)
# Setting: its axis' label, whether it is logarithmic, and its points on a CPU and on a GPU.
AXES = {
    "batch": ("batch (images)", True, (2, 4, 8), (16, 32, 64, 128)),
    "prototypes": (
        "K (prototypes)",
        True,
        (1024, 4096, 16384, 65536, 262144),
        (1024, 4096, 16384, 65536, 262144),
    ),
    "local_crops": ("local crops", False, (0, 2, 4, 8), (0, 2, 4, 8, 12)),
    "global_size": ("global crop (pixels a side)", False, (96, 160, 224), (96, 160, 224, 288)),
}
LOCAL_STEP = 16  # pixels: patch sizes divide it


def parse() -> argparse.Namespace:
    on_gpu = common.device() == "cuda"
    parser = common.parser(__doc__)
    common.add_network_options(parser)
    common.add_contestant_option(parser)
    for name, (label, _, *points) in AXES.items():
        help_text = f"points of this axis, {label}; none: leave it out (%(default)s)"
        parser.add_argument(
            f"--{name}_axis", type=int, nargs="*", default=points[on_gpu], help=help_text
        )
    parser.add_argument("--warm_up", type=int, default=1, help="steps that do not count")
    parser.add_argument("--steps", type=common.positive, default=3, help="the median counts")
    common.add_crop_options(parser, batch=64 if on_gpu else 2)
    return parser.parse_args()


def settings_along(base: dict, axis: str, value: int) -> dict:
    """The base setting with another value on one axis."""
    settings = base | {axis: value}
    if axis == "global_size":
        local = value * base["local_size"] / base["global_size"] / LOCAL_STEP
        settings["local_size"] = LOCAL_STEP * max(1, round(local))
    return settings


def measure_point(settings: dict, args: argparse.Namespace) -> dict:
    """Time and peak memory of a step; "failed" where its process ended."""
    name = ", ".join(f"{axis} {settings[axis]}" for axis in AXES)
    try:
        contestant = Contestant(name, common.own_step_command(settings))
        take_turns([contestant], args.warm_up, args.steps)
        memory = contestant.finish()
    except SystemExit as ended:  # as for want of memory: the other points stand
        print(ended)
        return {"failed": True}
    seconds = statistics.median(contestant.seconds)
    return {
        "milliseconds": 1e3 * seconds,
        "images_per_second": settings["batch"] / seconds,
        "peak_memory_gib": memory,
        "all_milliseconds": [1e3 * s for s in contestant.seconds],
    }


def measure(args: argparse.Namespace) -> dict[str, list[dict]]:
    """The points of each axis, each with its setting; the same setting is measured once."""
    base = common.settings_of(args, args.contestant)
    wanted = {
        axis: [settings_along(base, axis, value) for value in getattr(args, f"{axis}_axis")]
        for axis in AXES
    }
    for settings in sum(wanted.values(), []):
        options(settings)  # raises InputError before anything runs
    measured: list[tuple[dict, dict]] = []
    figures: dict[str, list[dict]] = {}
    for axis, points in wanted.items():
        figures[axis] = []
        for settings in points:
            known = [found for other, found in measured if other == settings]
            found = known[0] if known else measure_point(settings, args)
            measured.append((settings, found))
            own = {"global_size": ("local_size",)}.get(axis, ())
            figures[axis].append({name: settings[name] for name in (axis, *own)} | found)
            print(line(axis, figures[axis][-1]), flush=True)
    if all("failed" in found for _, found in measured):
        raise InputError("no point could be measured; what its process said stands above")
    return figures


def line(axis: str, point: dict) -> str:
    """One point in one line."""
    if "failed" in point:
        return f"{axis} {point[axis]}: failed"
    return (
        f"{axis} {point[axis]}: {point['milliseconds']:.0f} ms, peak "
        f"{point['peak_memory_gib']:.3f} GiB"
    )


def add_rest(points: list[dict], settings: dict) -> dict:
    """Splits the memory of each point along K; returns how the rest and the whole grow with K."""
    cfg = options(settings)
    heads = 2 if build.objective(cfg).needs_region_head else 1
    width = cfg.HEAD.BOTTLENECK_DIM
    for point in points:
        matrix = 4 * point["prototypes"] * width / 2**30
        point["k_sized_gib"] = heads * len(K_SIZED) * matrix
        point["rest_gib"] = point["peak_memory_gib"] - point["k_sized_gib"]
    least, most = (f(points, key=lambda p: p["prototypes"]) for f in (min, max))
    matrices = 4 * heads * width * (most["prototypes"] - least["prototypes"]) / 2**30
    return {
        "heads": heads,
        "bytes_of_a_matrix": f"4 K {width}",
        "k_sized_matrices_of_a_head": K_SIZED,
        "rest_differs_percent": 100 * (most["rest_gib"] / least["rest_gib"] - 1),
        "matrices_a_head_by_growth": (most["peak_memory_gib"] - least["peak_memory_gib"])
        / matrices,
    }
