r"""How time and peak memory of a step grow with batch, prototypes, local crops and image size.

    OMP_NUM_THREADS=2 python -m benchmarks.scaling --objective cmd --batch 2 \
        --output benchmarks/results/...

One axis at a time around a base setting, each point in a process of its own; a picture of four
panels is written beside the JSON. Along the axis of image size the local crops keep their ratio to
the global ones. K-sized by nature are, for each head and in float32, weight_v and W [K, d] of
student and teacher, the student's gradient, and both moments of its weight_v. The rest of the
memory should not depend on K.
"""

import argparse
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import common
from benchmarks.own_step import options
from benchmarks.turns import Contestant, take_turns
from engine import build
from utils.errors import InputError, run_script
from utils.files import replacing

GIB = 2**30
K_SIZED = (
    "student's weight_v",
    "student's W",
    "gradient of W, which gives way to that of weight_v",
    "first moment of weight_v",
    "second moment of weight_v",
    "teacher's weight_v",
    "teacher's W",
)


@dataclass(frozen=True)
class Axis:
    """A setting that is varied: its label, and its points on a CPU and on a GPU."""

    label: str
    on_cpu: tuple[int, ...]
    on_gpu: tuple[int, ...]


PROTOTYPES = (1024, 4096, 16384, 65536, 262144)
AXES = {
    "batch": Axis("batch, images", (2, 4, 6, 8), (16, 32, 64, 128)),
    "prototypes": Axis("K, prototypes", PROTOTYPES, PROTOTYPES),
    "local_crops": Axis("local crops an image", (0, 2, 4, 8), (0, 2, 4, 8, 12)),
    "global_size": Axis("side of a global crop, pixels", (96, 160, 224), (96, 160, 224, 288)),
}
LOCAL_STEP = 16  # pixels: patch sizes divide it
TIME, MEMORY = "#1f5fa8", "#c2571a"


def parse() -> argparse.Namespace:
    on_gpu = common.device() == "cuda"
    parser = common.parser(__doc__)
    common.add_network_options(parser)
    common.add_contestant_option(parser)
    for name, axis in AXES.items():
        points = axis.on_gpu if on_gpu else axis.on_cpu
        meaning = f"points of {axis.label}; without a number there are none (%(default)s)"
        parser.add_argument(f"--{name}_axis", type=int, nargs="*", default=points, help=meaning)
    parser.add_argument("--warm_up", type=int, default=1, help="steps that do not count")
    parser.add_argument("--steps", type=common.positive, default=3, help="the median counts")
    common.add_crop_options(parser, batch=64 if on_gpu else 2)
    return parser.parse_args()


def along(base: dict, axis: str, value: int) -> dict:
    """The base setting with another value on one axis."""
    settings = base | {axis: value}
    if axis == "global_size":
        local = value * base["local_size"] / base["global_size"]
        settings["local_size"] = LOCAL_STEP * max(1, round(local / LOCAL_STEP))
    return settings


def measure_point(settings: dict, args: argparse.Namespace) -> dict:
    """Time and peak memory of a step, or "failed" where its process ended."""
    name = ", ".join(f"{axis} {settings[axis]}" for axis in AXES)
    try:
        contestant = Contestant(name, common.own_step_command(settings))
        take_turns([contestant], args.warm_up, args.steps)
        memory = contestant.finish()
    except SystemExit as ended:  # perhaps for want of memory: the other points stand
        print(ended)
        return {"failed": True}
    seconds = statistics.median(contestant.seconds)
    return {
        "milliseconds": 1e3 * seconds,
        "images_per_second": settings["batch"] / seconds,
        "peak_memory_gib": memory,
        "all_milliseconds": [1e3 * s for s in contestant.seconds],
    }


def measure(args: argparse.Namespace, base: dict) -> dict[str, list[dict]]:
    """The points of each axis with their figures; a setting on two axes is measured once."""
    wanted = {
        axis: [along(base, axis, value) for value in sorted(set(getattr(args, f"{axis}_axis")))]
        for axis in AXES
    }
    for settings in itertools.chain.from_iterable(wanted.values()):
        options(settings)  # raises InputError before anything runs
    measured: dict[str, dict] = {}
    figures: dict[str, list[dict]] = {axis: [] for axis in AXES}
    for axis, points in wanted.items():
        for settings in points:
            if str(settings) not in measured:
                measured[str(settings)] = measure_point(settings, args)
            place = {name: settings[name] for name in (*AXES, "local_size")}
            figures[axis].append(place | measured[str(settings)])
            print(line(axis, figures[axis][-1]), flush=True)
    if all("failed" in found for found in measured.values()):
        raise InputError("no point could be measured; what their processes said stands above.")
    return figures


def line(axis: str, point: dict) -> str:
    """One point in one line."""
    if "failed" in point:
        return f"{axis} {point[axis]}: failed"
    return (
        f"{axis} {point[axis]}: {point['milliseconds']:.0f} ms, "
        f"peak {point['peak_memory_gib']:.3f} GiB"
    )


def memory_by_prototypes(points: list[dict], base: dict) -> dict:
    """How the memory along K is made up; adds the K-sized part and the rest to the points.

    points: at least two that were measured, by rising K.
    """
    cfg = options(base)
    objective = build.objective(cfg)
    heads = 2 if objective.needs_region_head else 1
    matrices = heads * len(K_SIZED)
    row = 4 * cfg.HEAD.BOTTLENECK_DIM / GIB  # of one [K, d]
    for point in points:
        point["k_sized_gib"] = matrices * row * point["prototypes"]
        point["rest_gib"] = point["peak_memory_gib"] - point["k_sized_gib"]
    least, most = points[0], points[-1]
    growth = most["peak_memory_gib"] - least["peak_memory_gib"]
    return {
        "k_sized_for_each_head": K_SIZED,
        "heads": heads,
        "k_sized_matrices": matrices,
        "width": cfg.HEAD.BOTTLENECK_DIM,
        "rest_differs_gib": most["rest_gib"] - least["rest_gib"],
        "rest_differs_percent": 100 * (most["rest_gib"] / least["rest_gib"] - 1),
        "matrices_of_growth": growth / row / (most["prototypes"] - least["prototypes"]),
    }


def draw(path: Path, title: str, figures: dict[str, list[dict]]) -> None:
    """A panel for each axis: time on the left, memory on the right."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, (name, axis) in zip(figure.subplots(2, 2).flat, AXES.items(), strict=True):
        points = [point for point in figures[name] if "failed" not in point]
        x = [point[name] for point in points]
        right = axes.twinx()
        seconds = [point["milliseconds"] / 1e3 for point in points]
        plot(axes, x, seconds, "time of a step, s", TIME, "o-")
        memory = [point["peak_memory_gib"] for point in points]
        plot(right, x, memory, "peak memory, GiB", MEMORY, "s-")
        if points and "rest_gib" in points[0]:
            rest = [point["rest_gib"] for point in points]
            right.plot(x, rest, "s--", color=MEMORY, alpha=0.5, label="memory less K-sized")
            right.legend(loc="upper left", frameon=False)
        if name == "prototypes":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.set_xlabel(axis.label)
    with replacing(path, "picture") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def plot(axes: Axes, x: list[int], y: list[float], label: str, colour: str, style: str) -> None:
    """One curve over an axis of its own from 0 on, both in its colour."""
    axes.plot(x, y, style, color=colour)
    axes.set_ylim(0, 1.15 * max(y, default=1))
    axes.set_ylabel(label, color=colour)
    axes.tick_params(axis="y", labelcolor=colour)


def main() -> None:
    args = parse()
    base = common.settings_of(args, args.contestant)
    figures = measure(args, base)
    along_k = [point for point in figures["prototypes"] if "failed" not in point]
    device = common.device_name(base["device"], args.threads)
    what = f"a step around {args.contestant}, {common.network_in_words(args)}"
    more = {}
    if len(along_k) > 1 and not build.objective(options(base)).projects:
        found = more["memory_by_prototypes"] = memory_by_prototypes(along_k, base)
        print(
            f"memory less what is K-sized: {along_k[0]['rest_gib']:.3f} to "
            f"{along_k[-1]['rest_gib']:.3f} GiB, {found['rest_differs_percent']:+.1f} %; all "
            f"grows as {found['matrices_of_growth']:.1f} float32 [K, d], listed are "
            f"{found['k_sized_matrices']}"
        )
    remarks = [
        "Medians; each point has a process of its own; drawn crops, no loading of data.",
        "Peak memory: of the whole process with its libraries after the warm-up on a CPU, "
        "allocated on a GPU.",
        "The local crops of the axis global_size keep their ratio to the global ones, to "
        f"{LOCAL_STEP} pixels.",
    ]
    common.write_report(args, what, figures, remarks, **more)
    if args.output:
        draw(args.output.with_suffix(".png"), f"{what}\n{device}", figures)


if __name__ == "__main__":
    run_script(main)
