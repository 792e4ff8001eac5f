"""The tables and the curves of a study, from the results that there are."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from engine.evaluation import table
from engine.evaluation.attention import NAMES as KINDS
from engine.evaluation.table import spread
from engine.pictures.curves import plot_runs, read_log
from engine.pictures.drawing import save
from engine.studies.evaluation import COARSE
from engine.studies.results import Results
from engine.studies.spec import Study
from engine.studies.zeros import RandomRow
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
    study: Study, data: str, randoms: Iterable[RandomRow], results: Results, seeds: Sequence[int]
) -> list[dict]:
    """The rows of a data set: guessing and random networks for each shape, then the cells.

    A row: name, title, the seeds behind it, and figures by name, each as table.spread gives it.
    """
    rows, own = [], [row for row in randoms if row.data == data]
    for row in own:
        which = "" if len(own) == 1 else f" ({study.cells[row.cells[0]].title})"
        zeros: dict[str, float] = {}
        for name, seed in results:
            if name == row.name or name in row.cells:
                zeros |= results[name, seed]["zeros"]
        guesses, fixed = {}, {}
        for name, zero in zeros.items():
            if name.startswith("fixed_"):
                fixed[name.replace("fixed_", "pointing_")] = spread([zero])
            else:
                guesses[name] = spread([zero])
        for title, figures in (("chance", guesses), ("best fixed patch", fixed)):
            if figures:
                rows.append(_row(f"{title} {row.name}", title + which, [], figures))
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
        both = [s for s in seeds if (cell.name, s) in results and (base, s) in results]
        if cell.data != data or cell.name == base or not both:
            continue
        less = []
        for seed in both:
            ours, theirs = (results[name, seed]["figures"] for name in (cell.name, base))
            less.append({name: ours[name] - theirs[name] for name in ours if name in theirs})
        rows.append(_row(cell.name, cell.title, both, _spreads(less)))
    return rows


def _row(name: str, title: str, seeds: list[int], figures: dict) -> dict:
    return {"name": name, "title": title, "seeds": seeds, "figures": figures}


def _found(name: str, title: str, results: Results, seeds: Sequence[int]) -> list[dict]:
    """The row of what is there under a name, if anything."""
    there = [seed for seed in seeds if (name, seed) in results]
    if not there:
        return []
    note = "" if len(there) == len(seeds) else f" (seed {', '.join(map(str, there))})"
    figures = _spreads([results[name, seed]["figures"] for seed in there])
    return [_row(name, title + note, there, figures)]


def _spreads(figures: list[dict[str, float]]) -> dict[str, dict]:
    """What all of these have, each as a spread."""
    names = [name for name in figures[0] if all(name in each for each in figures)]
    return {name: spread([each[name] for each in figures]) for name in names}


def write(
    study: Study, randoms: Iterable[RandomRow], results: Results, command: str, output: Path
) -> None:
    """OUT/results.json, table.md and curves.png of what is done."""
    seeds = list(dict.fromkeys([*study.seeds, *sorted({seed for _, seed in results})]))
    tables = {}
    lines = [f"# {study.name}: {len(study.cells)} cells, seeds {', '.join(map(str, seeds))}", ""]
    for data in study.data:
        rows = rows_of(study, data, randoms, results, seeds)
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
    lines += _behind(study, runs, behind, command)
    trained = [run["pretraining"]["seconds_of_steps"] for run in runs if "pretraining" in run]
    contents = {
        "study": study.name,
        **{name: found[0] if len(found) == 1 else found for name, found in behind.items()},
        "commands": [command],
        "seconds": round(sum(trained), 1),
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
    found = []
    for run in runs:
        value = run[name]
        if isinstance(value, dict):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        found.append(str(value))
    return list(dict.fromkeys(found))


def _behind(
    study: Study, runs: list[dict], behind: dict[str, list[str]], command: str
) -> list[str]:
    """What stands behind the numbers."""
    lines = [NOTE, "", f"- command: `{command}`"]
    lines += [f"- {name}: {'; '.join(values)}" for name, values in behind.items()]
    lines.append("- cells, each by its base and the options laid over it:")
    for cell in study.cells.values():
        options = (f"{key} {value}" for key, value in cell.options.items())
        lines.append(f"  - {cell.title}: {', '.join((cell.base.name, *options))}")
    for run in runs:
        if "pretraining" in run:
            steps, seconds = (run["pretraining"][key] for key in ("steps", "seconds_of_steps"))
            lines.append(
                f"- {run['name']}, seed {run['seed']}: {steps} steps in {seconds:.0f} s; sha256 "
                f"{run['checkpoint_sha256']}"
            )
    return [*lines, "", "results.json holds every value and each run's options."]


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
