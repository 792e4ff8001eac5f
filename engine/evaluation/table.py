"""The one writer of tables: rows of figures over seeds, as Markdown and as JSON."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.files import write_json, write_text

Figure = dict  # as `spread` gives it, and `remarks`, sentences that qualify it


def spread(values: Sequence[float]) -> Figure:
    """Mean, standard deviation (n - 1; None for one value) and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def cell(figure: Figure) -> str:
    """12.34 ± 0.56, or 12.34 where there is no deviation; with a star where there are remarks."""
    deviation = "" if figure["std"] is None else f" ± {figure['std']:.2f}"
    return f"{figure['mean']:.2f}{deviation}" + " \\*" * bool(figure.get("remarks"))


def difference(figure: Figure) -> str:
    """+1.50 (+1.00, +2.00): the mean and each seed's; of one seed that alone."""
    each = ", ".join(f"{value:+.2f}" for value in figure["values"])
    return f"{figure['mean']:+.2f} ({each})" if len(figure["values"]) > 1 else each


def markdown(
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, dict[str, Figure]]],
    corner: str = "",
    text: Callable[[Figure], str] = cell,
) -> list[str]:
    """The lines of a table of the columns and rows in which there is a figure; [] without any.

    columns: (name of a figure, heading); rows: (title, figures by name). corner: the heading
    of the titles. text: a figure as its cell shows it.
    """
    columns = [(name, head) for name, head in columns if any(name in own for _, own in rows)]
    rows = [(title, own) for title, own in rows if any(name in own for name, _ in columns)]
    if not columns:
        return []
    heads = " | ".join(heading for _, heading in columns)
    lines = [f"| {corner}".rstrip() + f" | {heads} |", "|---|" + "---:|" * len(columns)]
    for title, figures in rows:
        cells = [text(figures[name]) if name in figures else "–" for name, _ in columns]
        lines.append(f"| {escape(title)} | {' | '.join(cells)} |")
    return lines


def escape(text: str) -> str:
    """Text that may stand in a cell."""
    return text.replace("|", "\\|")


def write(folder: Path, lines: Sequence[str], contents: dict) -> None:
    """folder/table.md of these lines and folder/results.json of these contents."""
    write_json(folder / "results.json", contents)
    write_text(folder / "table.md", "\n".join(lines) + "\n")
