"""The tables and the curves of a study, from the results that there are."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from engine.evaluation import table
from engine.evaluation.attention import NAMES as KINDS
from engine.evaluation.table import spread
from engine.pictures.curves import plot_runs, read_log
from engine.pictures.drawing import save
from engine.studies.evaluation import COARSE
from engine.studies.results import Results, in_words
from engine.studies.spec import Study
from engine.studies.zeros import UntrainedRow
from utils.errors import InputError

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
NOTE = (
    "Percent (`× chance`: a ratio); mean ± standard deviation (n − 1) over the seeds; of "
    "differences the mean and, in brackets, each seed's. The linear probe is a logistic "
    "regression. Pointing: the strongest patch touches the part's box; mass: the attention on "
    "patches that touch it, beside that of uniform attention (chance)."
)


def rows_of(
    study: Study,
    data: str,
    untrained: Iterable[UntrainedRow],
    results: Results,
    seeds: Sequence[int],
) -> list[dict]:
    """The rows of a data set: guessing, random networks and starting weights, then the cells.

    A row: name, title, the seeds behind it, and figures by name, each as table.spread gives it.
    """
    rows, own = [], [row for row in untrained if row.data == data]
    for row in own:
        alike = [other for other in own if other.is_start == row.is_start]
        which = "" if len(alike) == 1 else f" ({study.cells[row.cells[0]].title})"
        if row.is_start:
            rows += _found(row.name, f"starting weights{which}", results, [0])
            continue
        zeros: dict[str, float] = {}
        for (name, _), result in results.items():
            if name in (row.name, *row.cells):
                zeros |= result["zeros"]
        fixed = {name: zeros.pop(name) for name in [*zeros] if name.startswith("fixed_")}
        fixed = {name.replace("fixed_", "pointing_"): zero for name, zero in fixed.items()}
        for title, figures in (("chance", zeros), ("best fixed patch", fixed)):
            rows += _row(f"{title} {row.name}", title + which, [], [figures] if figures else [])
        rows += _found(row.name, f"random initialisation{which}", results, seeds)
    for cell in study.cells.values():
        if cell.data == data:
            rows += _found(cell.name, cell.title, results, seeds)
    return rows


def differences(study: Study, data: str, results: Results, seeds: Sequence[int]) -> list[dict]:
    """Each cell less the data set's baseline, seed by seed; over the seeds that both have."""
    base = study.protocol.baselines.get(data)
    rows = []
    for cell in study.cells.values():
        if cell.data != data or cell.name == base:
            continue
        both = [s for s in seeds if (cell.name, s) in results and (base, s) in results]
        pairs = [[results[name, s]["figures"] for name in (cell.name, base)] for s in both]
        less = [{name: a[name] - b[name] for name in a if name in b} for a, b in pairs]
        rows += _row(cell.name, cell.title, both, less)
    return rows


def _row(name: str, title: str, seeds: list[int], figures: list[dict[str, float]]) -> list[dict]:
    """The row of what all of some figures have, each as a spread; none without figures."""
    if not figures:
        return []
    shared = [each for each in figures[0] if all(each in other for other in figures)]
    spreads = {each: spread([other[each] for other in figures]) for each in shared}
    return [{"name": name, "title": title, "seeds": seeds, "figures": spreads}]


def _found(name: str, title: str, results: Results, seeds: Sequence[int]) -> list[dict]:
    """The row of what is there under a name, if anything."""
    there = [seed for seed in seeds if (name, seed) in results]
    note = "" if len(there) == len(seeds) else f" (seed {', '.join(map(str, there))})"
    rows = _row(name, title + note, there, [results[name, seed]["figures"] for seed in there])
    for row in rows:
        for key, figure in row["figures"].items():
            said = (results[name, seed].get("remarks", {}).get(key, []) for seed in there)
            figure["remarks"] = [*dict.fromkeys(itertools.chain.from_iterable(said))]
    return rows


def write(
    study: Study, untrained: Iterable[UntrainedRow], results: Results, command: str, output: Path
) -> None:
    """OUT/results.json, table.md and curves.png of what is done."""
    seeds = list(dict.fromkeys([*study.seeds, *sorted({seed for _, seed in results})]))
    tables = {}
    lines = [f"# {study.name}: {len(study.cells)} cells, seeds {', '.join(map(str, seeds))}", ""]
    for data in study.data:
        rows = rows_of(study, data, untrained, results, seeds)
        if not rows:
            continue
        less = differences(study, data, results, seeds)
        tables[data] = {"rows": rows, "differences": less}
        about = next(result for result in results.values() if result["data_set"] == data)["data"]
        lines += [
            f"## {data}: {about['classes']} classes, {about['train']['images']} training and "
            f"{about['test']['images']} test images",
            "",
        ]
        for heading, columns in SECTIONS.items():
            named = [(name, column.format(k=study.protocol.k)) for name, column in columns]
            lines += _table(heading, named, rows, table.cell)
            if less:
                base = study.cells[study.protocol.baselines[data]].title
                title = f"{heading}: difference to {base}"
                lines += _table(title, named, less, table.difference)
    runs = [results[key] for key in sorted(results)]
    behind = {name: _distinct(runs, name) for name in ("date", "commit", "device", "versions")}
    lines += [NOTE, "", f"- command: `{command}`"]
    lines += [f"- {name}: {'; '.join(values)}" for name, values in behind.items()]
    lines.append("- cells, each by its base and the options laid over it:")
    for cell in study.cells.values():
        options = (f"{key} {value}" for key, value in cell.options.items())
        lines.append(f"  - {cell.title}: {', '.join((cell.base.name, *options))}")
    trained = [run for run in runs if "pretraining" in run]
    for run in trained:
        steps, seconds = (run["pretraining"][key] for key in ("steps", "seconds_of_steps"))
        lines.append(
            f"- {run['name']}, seed {run['seed']}: {steps} steps in {seconds:.0f} s; sha256 "
            f"{run['checkpoint_sha256']}"
        )
    for run in runs:
        name = f"{run['name']}, seed {run['seed']}"
        for figure, remarks in run.get("remarks", {}).items():
            lines.append(f"- \\* {figure} of {name}: {'; '.join(remarks)}")
    lines += ["", "results.json holds every value and each run's options."]
    contents = {
        "study": study.name,
        **{name: found[0] if len(found) == 1 else found for name, found in behind.items()},
        "commands": [command],
        "seconds": round(sum(run["pretraining"]["seconds_of_steps"] for run in trained), 1),
        "figures": tables,
        "runs": runs,
    }
    table.write(output, lines, contents)
    _plot_runs(study, seeds, output)


def _table(
    heading: str, columns: list[tuple[str, str]], rows: list[dict], text: Callable[[dict], str]
) -> list[str]:
    """A table below its heading; [] without figures."""
    titled = [(row["title"], row["figures"]) for row in rows]
    lines = table.markdown(columns, titled, text=text)
    return [f"### {heading}", "", *lines, ""] if lines else []


def _distinct(runs: list[dict], name: str) -> list[str]:
    """What these results say under a name, as text, each once."""
    return list(dict.fromkeys(in_words(run[name]) for run in runs))


def _plot_runs(study: Study, seeds: Sequence[int], output: Path) -> None:
    """OUT/curves.png: the logs of all runs."""
    logs: dict[str, dict[int, list[dict]]] = {}
    for cell in study.cells.values():
        title = cell.title if len(study.data) == 1 else f"{cell.title} ({cell.data})"
        for seed in seeds:
            with suppress(InputError):  # not begun, or the runs are elsewhere
                log = read_log(output / "runs" / cell.name / f"seed{seed}" / "log.txt")
                logs.setdefault(title, {})[seed] = log
    if logs:
        save(plot_runs(logs), output / "curves.png")
