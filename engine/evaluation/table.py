"""The table of several networks under one protocol: rows of means and deviations, as Markdown."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from engine.evaluation.source import RANDOM
from utils import config
from utils.config import Node


def spread(values: Sequence[float]) -> dict:
    """Mean, standard deviation (n - 1; None for one value) and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def columns(cfg: Node) -> list[tuple[str, str]]:
    """(key of a row's figures, heading) in the order of the table."""
    k = shown_k(cfg)
    shares = [(f"linear_{share:g}", _linear_heading(cfg, share)) for share in shares_of(cfg)]
    ratio = " (ratio split)" if cfg.RETRIEVAL.SPLIT == "ratio" else ""
    return [
        (f"knn_{k}", f"{k}-NN top-1"),
        *shares,
        ("rank1", f"Rank-1{ratio}"),
        ("rank5", f"Rank-5{ratio}"),
        ("map", f"mAP{ratio}"),
    ]


def shown_k(cfg: Node) -> int:
    """The number of neighbours in the table: 20, the field's, where it is asked for."""
    return 20 if 20 in cfg.KNN.KS else cfg.KNN.KS[0]


def shares_of(cfg: Node) -> list[float]:
    """The shares of labels, the most first."""
    return sorted(set(cfg.LINEAR.LABEL_SHARES), reverse=True)


def _linear_heading(cfg: Node, share: float) -> str:
    name = "linear" if cfg.LINEAR.CLASSIFIER == "sgd" else "logistic"
    return f"{name} top-1" + ("" if share == 1 else f", {100 * share:g} % of labels")


def cell(figure: dict) -> str:
    """12.34 ± 0.56, or 12.34 where there is no deviation."""
    deviation = "" if figure["std"] is None else f" ± {figure['std']:.2f}"
    return f"{figure['mean']:.2f}{deviation}"


def markdown(rows: list[dict], provenance: dict, cfg: Node) -> str:
    """The table, and below it what stands behind each number."""
    heads = columns(cfg)
    data = provenance["data"]
    train, test = data["train"]["images"], data["test"]["images"]
    folder = Path(cfg.DATA.PATH).absolute().name
    pooling = f"pooling {cfg.EVAL.POOLING}"
    lines = [
        f"# {data['name']} ({_escape(folder)}): {data['classes']} classes, {train} training and "
        f"{test} test images",
        "",
        "| network | " + " | ".join(heading for _, heading in heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for row in rows:
        cells = " | ".join(cell(row["figures"][key]) for key, _ in heads)
        lines.append(f"| {_escape(row['name'])} | {cells} |")
    spread_text = (
        f"± is the standard deviation over {cfg.EVAL.SEEDS} seeds: of the probe and of the choice "
        f"of labels, and for a random initialisation of the network too; k-NN and retrieval of a "
        f"checkpoint have none."
        if cfg.EVAL.SEEDS > 1
        else "One seed."
    )
    lines += [
        "",
        f"Percent. {spread_text} The linear probe counts after its last epoch.",
        "",
        *(f"- data: {_escape(note)}" for note in data["notes"]),
        f"- command: `{provenance['command']}`",
        f"- commit: {provenance['commit'] or 'unknown'}; date: {provenance['date']}",
        f"- device: {provenance['device']}, processes: {provenance['processes']}",
        "- versions: " + ", ".join(f"{k} {v}" for k, v in provenance["versions"].items()),
        f"- options that are not the defaults: {config.changed(cfg)}",
    ]
    for row in rows:
        line = f"- {_escape(row['name'])}: {row['network']}, {pooling}"
        if row["weights"]["path"] != RANDOM:
            line += f", sha256 {row['weights']['sha256']}"
        for split, images in sorted(row["unreadable_images"].items()):
            line += f"; {len(images)} unreadable images of the {split} split are left out"
        lines.append(line)
    lines.append("")
    lines.append("results.json holds every value, the options and those of each checkpoint's run.")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
