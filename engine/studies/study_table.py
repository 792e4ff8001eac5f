"""The tables and the curves of a study, from the results that there are."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from engine.evaluation.attention import NAMES as KINDS
from engine.evaluation.table import cell as shown
from engine.evaluation.table import spread
from engine.pictures.curves import read_log
from engine.studies.study import Study
from engine.studies.study_evaluation import COARSE
from engine.studies.study_results import RandomRow
from utils.errors import InputError
from utils.files import replacing, write_json, write_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Results = dict[tuple[str, int], dict]  # (cell or random row, seed) -> its JSON
SHORT = ("knn_default", "linear", "coarse_knn_default", "pointing_mil")  # told as a run ends
_LABELS = (
    ("knn_default", "{k}-NN"),
    ("knn_mean", "{k}-NN, mean"),
    ("knn_mil", "{k}-NN, mil"),
    ("knn_lcr", "{k}-NN, lcr"),
    ("linear", "linear"),
    ("rank1", "Rank-1"),
    ("map", "mAP"),
)
_LOOKS = (("pointing", "pointing"), ("mass", "mass"), ("ratio", "× chance"))
# Heading -> (name of a figure, its column's heading).
SECTIONS = {
    "Fine classes": _LABELS,
    "Coarse classes": tuple((f"{COARSE}{name}", heading) for name, heading in _LABELS),
    "Attention on the part": tuple(
        (f"{name}_{kind}", f"{kind}: {heading}") for kind in KINDS for name, heading in _LOOKS
    ),
}
PANELS = {
    "loss": "loss",
    "knn_top1": "k-NN of the teacher, %",
    "feature_rank": "effective rank of the features",
    "attention_entropy": "attention entropy (1: uniform)",
}


@dataclass(frozen=True)
class Row:
    """A row: figures by name, each as table.spread gives it; `seeds` are behind them."""

    name: str
    title: str
    figures: dict[str, dict]
    seeds: list[int]


def rows_of(
    study: Study, data: str, randoms: Sequence[RandomRow], results: Results, seeds: Sequence[int]
) -> list[Row]:
    """The rows of a data set: guessing and random networks for each shape, then the cells."""
    rows, own = [], [row for row in randoms if row.data == data]
    for row in own:
        which = "" if len(own) == 1 else f" ({study.cells[row.cells[0]].title})"
        zeros: dict[str, float] = {}
        for name in (row.name, *row.cells):
            for seed in seeds:
                zeros |= results.get((name, seed), {"zeros": {}})["zeros"]
        fixed = {f"pointing_{kind}": f"fixed_{kind}" for kind in KINDS if f"fixed_{kind}" in zeros}
        guesses = {name: zero for name, zero in zeros.items() if not name.startswith("fixed_")}
        best = {name: zeros[zero] for name, zero in fixed.items()}
        for title, figures in (("chance", guesses), ("best fixed patch", best)):
            if figures:
                spreads = {name: spread([value]) for name, value in figures.items()}
                rows.append(Row(f"{title} {row.name}", f"{title}{which}", spreads, []))
        rows += _found(row.name, f"random initialisation{which}", results, seeds)
    for cell in study.cells.values():
        if cell.data == data:
            rows += _found(cell.name, cell.title, results, seeds)
    return rows


def _found(name: str, title: str, results: Results, seeds: Sequence[int]) -> list[Row]:
    """The row of what is there under a name, if anything."""
    there = [seed for seed in seeds if (name, seed) in results]
    if not there:
        return []
    known = [results[name, seed]["figures"] for seed in there]
    names = [key for key in known[0] if all(key in figures for figures in known)]
    figures = {key: spread([each[key] for each in known]) for key in names}
    note = "" if len(there) == len(seeds) else f" (seed {', '.join(map(str, there))})"
    return [Row(name, title + note, figures, there)]


def differences(study: Study, data: str, results: Results, seeds: Sequence[int]) -> list[Row]:
    """Each cell less the data set's baseline, seed by seed; over the seeds that both have."""
    base = study.protocol.baselines.get(data)
    rows = []
    for cell in study.cells.values():
        both = [s for s in seeds if (cell.name, s) in results and (base, s) in results]
        if cell.data != data or cell.name == base or not both:
            continue
        pairs = [(results[cell.name, s]["figures"], results[base, s]["figures"]) for s in both]
        names = [key for key in pairs[0][0] if all(key in ours and key in b for ours, b in pairs)]
        figures = {key: spread([ours[key] - b[key] for ours, b in pairs]) for key in names}
        rows.append(Row(cell.name, cell.title, figures, both))
    return rows


def difference(figure: dict) -> str:
    """+1.50 (+1.00, +2.00): the mean and each seed's; of one seed that alone."""
    each = ", ".join(f"{value:+.2f}" for value in figure["values"])
    return f"{figure['mean']:+.2f} ({each})" if len(figure["values"]) > 1 else each


def write(
    study: Study,
    randoms: Sequence[RandomRow],
    results: Results,
    seeds: Sequence[int],
    command: str,
    output: Path,
) -> None:
    """OUT/results.json, table.md and curves.png of what is done."""
    tables = {}
    lines = [f"# {study.name}: {len(study.cells)} cells, seeds {', '.join(map(str, seeds))}", ""]
    for data in study.data:
        rows = rows_of(study, data, randoms, results, seeds)
        less = differences(study, data, results, seeds)
        if not rows:
            continue
        tables[data] = {"rows": _plain(rows), "differences": _plain(less)}
        first = next(result for result in results.values() if result["data_set"] == data)
        about = first["data"]
        lines += [
            f"## {data}: {about['classes']} classes, {about['train']['images']} training and "
            f"{about['test']['images']} test images",
            "",
        ]
        for heading, columns in SECTIONS.items():
            lines += _table(heading, columns, rows, study.protocol.k, shown)
            if less:
                base = study.cells[study.protocol.baselines[data]].title
                lines += _table(
                    f"{heading}: difference to {base}", columns, less, study.protocol.k, difference
                )
    lines += _behind(study, results, command)
    runs = [results[key] for key in sorted(results)]
    trained = [run["pretraining"]["seconds_of_steps"] for run in runs if "pretraining" in run]
    contents = {
        "study": study.name,
        **{name: _one_or_all(run[name] for run in runs) for name in ("date", "commit", "device")},
        "versions": _one_or_all(_versions(run) for run in runs),
        "commands": [command],
        "seconds": round(sum(trained), 1),
        "figures": tables,
        "runs": runs,
    }
    write_json(output / "results.json", contents)
    write_text(output / "table.md", "\n".join(lines) + "\n")
    plot_curves(study, seeds, output)


def _plain(rows: Iterable[Row]) -> list[dict]:
    return [
        {"name": row.name, "title": row.title, "seeds": row.seeds, "figures": row.figures}
        for row in rows
    ]


def _table(heading: str, columns, rows: list[Row], k: int, text) -> list[str]:
    """A Markdown table of the columns and rows in which there is something; none without."""
    columns = [(n, h) for n, h in columns if any(n in row.figures for row in rows)]
    rows = [row for row in rows if any(name in row.figures for name, _ in columns)]
    if not columns:
        return []
    lines = [
        f"### {heading}",
        "",
        "| | " + " | ".join(column.format(k=k) for _, column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in rows:
        cells = [text(row.figures[n]) if n in row.figures else "–" for n, _ in columns]
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    return [*lines, ""]


def _behind(study: Study, results: Results, command: str) -> list[str]:
    """What stands behind the numbers."""
    lines = [
        "Percent (`× chance`: a ratio); mean ± standard deviation (n − 1) over the seeds; of "
        "differences the mean and, in brackets, each seed's. The linear probe is a logistic "
        "regression. Pointing: the strongest patch touches the part's box; mass: the attention on "
        "patches that touch it, beside that of uniform attention (chance).",
        "",
        f"- command: `{command}`",
    ]
    for name in ("commit", "device", "date"):
        lines.append(
            f"- {name}: {', '.join(_distinct(result[name] for result in results.values()))}"
        )
    versions = _distinct(_versions(result) for result in results.values())
    lines.append(f"- versions: {'; '.join(versions)}")
    lines.append("- cells, each by its base and the options laid over it:")
    for cell in study.cells.values():
        options = (f"{key} {value}" for key, value in cell.options.items())
        lines.append(f"  - {cell.title}: {', '.join((cell.base.name, *options))}")
    for name, seed in sorted(results):
        about = results[name, seed].get("pretraining")
        if about:
            lines.append(
                f"- {name}, seed {seed}: {about['steps']} steps in {about['seconds_of_steps']:.0f} "
                f"s; sha256 {results[name, seed]['checkpoint_sha256']}"
            )
    return [*lines, "", "results.json holds every value and each run's options."]


def _versions(result: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def _one_or_all(values: Iterable[object]) -> str | list[str]:
    found = _distinct(values)
    return found[0] if len(found) == 1 else found


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values))


def plot_curves(study: Study, seeds: Sequence[int], output: Path) -> None:
    """OUT/curves.png: the logs of all runs, a colour for each cell, a dash for each seed."""
    logs = {}
    for cell in study.cells:
        for seed in seeds:
            try:
                logs[cell, seed] = read_log(output / "runs" / cell / f"seed{seed}" / "log.txt")
            except InputError:
                continue  # not begun, or the runs are elsewhere
    panels = {
        name: title
        for name, title in PANELS.items()
        if any(name in line for log in logs.values() for line in log)
    }
    if not panels:
        return
    rows = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(13, 4.2 * rows), layout="constrained", squeeze=False
    )
    colours = dict(zip(study.cells, plt.get_cmap("tab20").colors * len(study.cells), strict=False))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=False):
        for (cell, seed), log in logs.items():
            points = [(line["epoch"], line[name]) for line in log if line.get(name) is not None]
            if points:
                dash = ("-", "--", ":", "-.")[list(seeds).index(seed) % 4]
                label = f"{study.cells[cell].title}, seed {seed}"
                axis.plot(*zip(*points, strict=True), dash, color=colours[cell], label=label, lw=1)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    handles = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    with replacing(output / "curves.png", "picture") as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
