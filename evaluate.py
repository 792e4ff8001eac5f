"""The table: several checkpoints on one benchmark, by k-NN, linear probe and retrieval.

    python evaluate.py --checkpoint CKPT [CKPT ...] --dataset cub --data_path DATA \\
        --output_dir OUT --seeds 3
Every checkpoint is a row, and so is a randomly initialised network of each shape among them. With
several processes: torchrun --nproc_per_node=8 evaluate.py ... --features cached extracts features
once instead of augmenting the images for each epoch of the linear probe; --label_shares 0.1 0.2
0.5 1 adds probes with few labels. Written into OUT: results.json and table.md, and what a second
try takes up again: features/ and probes/.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

from engine.evaluation import table
from engine.evaluation.feature_cache import SplitFeatures
from engine.evaluation.features import Reading
from engine.evaluation.measure import KNN, Retrieval, measure
from engine.evaluation.opening import join, network_line, open_source, open_splits
from engine.evaluation.probing import LinearProbe
from engine.evaluation.provenance import provenance
from engine.evaluation.source import NO_KEY, RANDOM, Source, random_like
from utils import cli, config, distributed
from utils.config import Node
from utils.errors import InputError, run_script
from utils.files import make_folder
from utils.logging import logger


def main() -> None:
    command = cli.parse(__doc__, face=cli.TABLE)
    cfg = command.cfg
    paths = command.extra.get("--checkpoint", [])
    for given, flag in ((paths, "--checkpoint"), (cfg.DATA.PATH, "--data_path")):
        if not given:
            raise InputError(f"nothing to evaluate: give {flag}.")
    if not cfg.OUTPUT_DIR:
        raise InputError("no folder for the table: give --output_dir.")
    world = join(command)
    folder = Path(cfg.OUTPUT_DIR)
    distributed.on_main(lambda: make_folder(folder))

    # The networks: all are opened, and shown an image, before any work.
    sources = [open_source(path, command) for path in paths]
    splits = open_splits(cfg)
    networks = [
        SplitFeatures(source, splits, Reading.of(cfg, world, source), cfg.EVAL.POOLING)
        for source in sources
    ]
    for network in networks:
        encoder = network.encoder(cfg.LINEAR.N_LAST_BLOCKS, cfg.LINEAR.AVGPOOL_PATCHTOKENS)
        encoder.widths(network.reading.size)
    sizes = sorted({network.reading.size for network in networks})
    if len(sizes) > 1:
        named = " and ".join(map(str, sizes))
        logger.warning(
            f"each network is shown images of its own run's size, here {named} pixels: rows of "
            f"different sizes cannot be compared; EVAL.SIZE N shows all the same."
        )
    # And a random initialisation for each shape of network and image size among these.
    shapes: dict[tuple[str, int], SplitFeatures] = {}
    for network in networks:
        shape = repr(network.source.shape(cfg.EVAL.POOLING))
        shapes.setdefault((shape, network.reading.size), network)
    networks += [with_source(own, random_like(own.source, cfg.SEED)) for own in shapes.values()]

    # The three protocols for each; what is done is written row by row.
    rows, behind = [], provenance(cfg, networks[0])
    for network in networks:
        logger.info(f"{row_name(network)}: {network_line(network)}")
        rows.append(row(network, folder, cfg))
        for key, heading in columns(cfg):
            figure = rows[-1]["figures"][key]
            plain = table.cell(figure | {"remarks": []})
            logger.info("; ".join([f"  {heading}: {plain} %", *figure["remarks"]]))
        distributed.on_main(
            lambda: table.write(folder, document(rows, behind, cfg), {"rows": rows} | behind)
        )
    logger.info(f"written: {folder}/table.md, results.json")
    distributed.stop()


def row(network: SplitFeatures, folder: Path, cfg: Node) -> dict:
    """Figures of one network over the seeds, each a mean, a deviation and its values.

    A random initialisation is drawn anew for every seed.
    """
    figures: dict[str, list[float]] = defaultdict(list)
    remarks: dict[str, list[str]] = defaultdict(list)
    details, unreadable = [], {}
    network = with_source(network, network.source)  # features go with the row
    is_random = network.source.weights.is_random
    for seed in range(cfg.SEED, cfg.SEED + cfg.EVAL.SEEDS):
        drawn = network
        if is_random:
            drawn = with_source(network, random_like(network.source, seed))
        drawn = replace(drawn, folder=folder / "features" / identity(drawn))
        own = folder / "probes" / probe_identity(drawn, cfg) / f"seed_{seed}"
        protocols = []
        if is_random or seed == cfg.SEED:
            protocols = [KNN(cfg.KNN.KS, cfg.KNN.TEMPERATURE), Retrieval(cfg.RETRIEVAL.SPLIT)]
        protocols += [LinearProbe(cfg.LINEAR, share, seed, own) for share in shares_of(cfg)]
        for found in measure(drawn, protocols):
            details.append(found.figures)
            for key, value, more in flat(found.figures):
                figures[key].append(value)
                remarks[key] += (remark for remark in more if remark not in remarks[key])
        unreadable |= drawn.bad
    return {
        "name": row_name(network),
        "network": network_line(network),
        "weights": asdict(network.source.weights),
        "image_size": {"crop": network.reading.size, "resize": network.reading.resize},
        "figures": {
            key: table.spread(values) | {"remarks": remarks[key]} for key, values in figures.items()
        },
        "details": details,
        "unreadable_images": unreadable,
    }


def flat(found: dict) -> list[tuple[str, float, list[str]]]:
    """(key, value, remarks) of a protocol's figures that have a column or could have one."""
    remarks = found["remarks"]
    if found["protocol"] == "k-NN":
        return [
            (f"knn_{k}{suffix}", each[name], each["remarks"])
            for name, suffix in (("top1", ""), ("top5", "_top5"))
            for k, each in found["k"].items()
        ]
    if found["protocol"] == "retrieval":
        names = ("rank1", "rank5", "map", "map_at_100_released")
        return [(name, found[name], remarks) for name in names]
    return [(f"linear_{found['label_share']:g}", found["top1"], remarks)]


def with_source(network: SplitFeatures, source: Source) -> SplitFeatures:
    """The same for another network; no features yet."""
    return replace(network, source=source, bad={}, held={})


def identity(network: SplitFeatures) -> str:
    """A folder's name for a network at a size."""
    return digest([network.source.identity(network.pooling), network.reading.size])


def probe_identity(network: SplitFeatures, cfg: Node) -> str:
    """A folder's name for a network's probes with these options."""
    settings = config.to_dict(cfg)["LINEAR"]
    del settings["LABEL_SHARES"]
    batch = cfg.EVAL.BATCH_SIZE_PER_GPU * network.reading.world.size
    more = [network.reading.resize, cfg.EVAL.PRECISION, batch]
    return digest([identity(network), settings, more])


def digest(contents: list) -> str:
    """A short name for plain data."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def row_name(network: SplitFeatures) -> str:
    """The checkpoint's path, with the key where it is not the teacher; or what is random."""
    weights = network.source.weights
    if weights.is_random:
        return f"{RANDOM} ({weights.arch}, {network.reading.size} px)"
    is_usual = weights.key in ("teacher", NO_KEY)
    return weights.path if is_usual else f"{weights.path} ({weights.key})"


def columns(cfg: Node) -> list[tuple[str, str]]:
    """(key of a row's figures, heading) in the order of the table."""
    # 20 neighbours, the field's number, where it is asked for.
    k = 20 if 20 in cfg.KNN.KS else cfg.KNN.KS[0]
    ratio = " (ratio split)" if cfg.RETRIEVAL.SPLIT == "ratio" else ""
    linear = "linear" if cfg.LINEAR.CLASSIFIER == "sgd" else "logistic"
    found = [(f"knn_{k}", f"{k}-NN top-1")]
    for share in shares_of(cfg):
        few = "" if share == 1 else f", {100 * share:g} % of labels"
        found.append((f"linear_{share:g}", f"{linear} top-1{few}"))
    names = (("rank1", "Rank-1"), ("rank5", "Rank-5"), ("map", "mAP"))
    return found + [(name, f"{heading}{ratio}") for name, heading in names]


def shares_of(cfg: Node) -> list[float]:
    """The shares of labels, the most first."""
    return sorted(set(cfg.LINEAR.LABEL_SHARES), reverse=True)


def document(rows: list[dict], behind: dict, cfg: Node) -> list[str]:
    """The table, and below it what stands behind each number."""
    data = behind["data"]
    title = f"{data['name']} ({Path(cfg.DATA.PATH).absolute().name})"
    seeds = (
        f"± is the standard deviation over {cfg.EVAL.SEEDS} seeds: of the probe and of the choice "
        f"of labels, and for a random initialisation of the network too; k-NN and retrieval of a "
        f"checkpoint have none."
        if cfg.EVAL.SEEDS > 1
        else "One seed."
    )
    lines = [
        f"# {title}: {data['classes']} classes, {data['train']['images']} training and "
        f"{data['test']['images']} test images",
        "",
        *table.markdown(columns(cfg), [(r["name"], r["figures"]) for r in rows], "network"),
        "",
        f"Percent. {seeds} The linear probe counts after its last epoch.",
        "",
        *(f"- data: {note}" for note in data["notes"]),
        f"- command: `{behind['command']}`",
        f"- commit: {behind['commit'] or 'unknown'}; date: {behind['date']}",
        f"- device: {behind['device']}, processes: {behind['processes']}",
        "- versions: " + ", ".join(f"{k} {v}" for k, v in behind["versions"].items()),
        f"- options that are not the defaults: {config.changed(cfg)}",
    ]
    for r in rows:
        line = f"- {r['name']}: {r['network']}, pooling {cfg.EVAL.POOLING}"
        if r["weights"]["path"] != RANDOM:
            line += f", sha256 {r['weights']['sha256']}"
            line += "".join(f"; {doubt}" for doubt in r["weights"]["doubts"])
        for split, images in sorted(r["unreadable_images"].items()):
            line += f"; {len(images)} unreadable images of the {split} split are left out"
        lines.append(line)
    for r in rows:
        for key, heading in columns(cfg):
            if remarks := r["figures"][key]["remarks"]:
                lines.append(f"- \\* {heading} of {r['name']}: {'; '.join(remarks)}")
    closing = "results.json holds every value, the options and those of each checkpoint's run."
    return [*lines, "", closing]


if __name__ == "__main__":
    run_script(main, if_interrupted="the same command goes on where it stopped")
