"""A run's log as curves: the loss and its terms, the teacher's health, the schedules."""

import contextlib
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from engine.pictures.drawing import DPI, LOOK
from utils.errors import InputError

# The panels, at most six of which a run logs. Beside the loss stand its terms, the figures whose
# names begin with a capital letter.
CURVES = {
    "loss": ("loss",),
    "teacher, nats": ("teacher_entropy", "teacher_kl_uniform", "teacher_information"),
    "queries nearest to their own key, percent": ("contrast_accuracy",),
    "effective rank of the features": ("feature_rank",),
    "gradient norm": ("grad_norm",),
    "attention entropy (1: uniform)": ("attention_entropy",),
    "learning rate": ("lr",),
}
# Of several runs side by side; the k-NN where the runs have it.
COMPARED = {
    "loss": "loss",
    "knn_top1": "k-NN of the teacher, %",
    "feature_rank": "effective rank of the features",
    "attention_entropy": "attention entropy (1: uniform)",
}


def read_log(path: Path) -> list[dict]:
    """The lines of a run's log.txt; InputError without any.

    One that is torn, by a power cut or because it is being written, is left out.
    """
    lines = []
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                lines.append(dict(json.loads(line)))
    if not any("loss" in line for line in lines):
        raise InputError(f"{path} is not the log of a run: give the folder that main_cmd.py wrote.")
    return lines


@LOOK
def plot_curves(lines: list[dict]) -> Figure:
    """The lines of `read_log` over the epochs."""
    steps = [line for line in lines if "loss" in line]
    epochs = [line["epoch"] for line in steps]
    figure = Figure(figsize=(13, 6.5), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 3)
    known = dict.fromkeys(name for line in steps for name in line)
    terms = [name for name in known if name[0].isupper()]
    for title, names in CURVES.items():
        logged = [name for name in (*names, *terms * (title == "loss")) if name in known]
        if not logged:
            continue
        axis = figure.add_subplot(grid[len(figure.axes)])
        for name in logged:
            axis.plot(epochs, [line.get(name) for line in steps], label=name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if logged == ["attention_entropy"]:
            axis.set_ylim(0, 1.05)
        if len(logged) > 1:
            axis.legend(fontsize="small")
    return figure


@LOOK
def plot_runs(logs: dict[str, dict[int, list[dict]]]) -> Figure:
    """Several runs over the epochs: a colour for each title, a dash for each seed.

    logs: title -> seed -> the lines of `read_log`.
    """
    lines = [line for runs in logs.values() for log in runs.values() for line in log]
    logged = [name for name in COMPARED if any(name in line for line in lines)]
    rows = (len(logged) + 1) // 2
    figure = Figure(figsize=(13, 4.2 * rows), dpi=DPI, layout="constrained")
    palette, dashes = matplotlib.colormaps["tab20"].colors, ("-", "--", ":", "-.")
    seeds = sorted({seed for runs in logs.values() for seed in runs})
    curves = {}  # by label
    for place, name in enumerate(logged):
        axis = figure.add_subplot(rows, 2, place + 1, title=COMPARED[name], xlabel="epoch")
        axis.grid(alpha=0.3)
        for colour, (title, runs) in enumerate(logs.items()):
            for seed, log in runs.items():
                known = [line for line in log if line.get(name) is not None]
                (curves[f"{title}, seed {seed}"],) = axis.plot(
                    [line["epoch"] for line in known],
                    [line[name] for line in known],
                    dashes[seeds.index(seed) % len(dashes)],
                    color=palette[colour % len(palette)],
                    lw=1,
                )
    figure.legend(curves.values(), curves.keys(), loc="outside right upper", fontsize="small")
    return figure
