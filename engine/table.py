"""The table of several networks under one protocol: rows of means and deviations, as Markdown."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from engine import encoder
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
    seeds = f"{cfg.EVAL.SEEDS} seeds" if cfg.EVAL.SEEDS > 1 else "one seed"
    lines += [
        "",
        f"Percent. ± is the standard deviation over {seeds}: of the probe and of the choice of "
        f"labels, and for a random initialisation of the network too; k-NN and retrieval of a "
        f"checkpoint have none. The linear probe counts after its last epoch.",
        "",
        f"- command: `{provenance['command']}`",
        f"- commit: {provenance['commit'] or 'unknown'}; date: {provenance['date']}",
        f"- device: {provenance['device']}, processes: {provenance['processes']}",
        "- versions: " + ", ".join(f"{k} {v}" for k, v in provenance["versions"].items()),
        f"- options that are not the defaults: {_changed(cfg)}",
    ]
    for row in rows:
        weights = row["weights"]
        size = row["image_size"]
        where = f"{weights['arch']}, {size['crop']} px of {size['resize']}"
        if weights["path"] == encoder.RANDOM:
            lines.append(f"- {_escape(row['name'])}: {where}")
        else:
            epoch = "" if weights["epoch"] is None else f", epoch {weights['epoch']}"
            lines.append(
                f"- {_escape(row['name'])}: {where}, {weights['key']}{epoch}, "
                f"sha256 {weights['sha256']}"
            )
    lines.append("")
    lines.append("results.json holds every value, the options and those of each checkpoint's run.")
    return "\n".join(lines) + "\n"


def _changed(cfg: Node) -> str:
    names = config.differing(cfg, config.defaults(), ("OUTPUT_DIR", "DATA", "INIT", "DEVICE"))
    return ", ".join(f"{name} {config.get(cfg, name)}" for name in names) or "none"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
