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
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from engine.evaluation import table
from engine.evaluation.evaluation import (
    SPLITS,
    Evaluation,
    build_evaluation,
    join,
    open_source,
    open_splits,
)
from engine.evaluation.probing import run_linear, share_folder
from engine.evaluation.protocols import run_knn, run_retrieval
from engine.evaluation.source import NO_KEY, RANDOM, random_like
from utils import cli, config, distributed, flags
from utils.config import Node
from utils.errors import InputError, run_script
from utils.files import make_folder, write_json, write_text
from utils.logging import logger


def main() -> None:
    command = cli.parse(__doc__, face=flags.TABLE)
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

    # The rows: all networks are opened, and shown an image, before any work.
    sources = [open_source(path, command) for path in paths]
    splits = open_splits(cfg)
    evaluations = [build_evaluation(cfg, world, source, splits, None) for source in sources]
    probe = cfg.LINEAR
    for evaluation in evaluations:
        network = evaluation.encoder(probe.N_LAST_BLOCKS, probe.AVGPOOL_PATCHTOKENS)
        network.widths(evaluation.size)
    evaluations += zeros(evaluations)

    # The three protocols for each; what is done is written row by row.
    rows, provenance = [], evaluations[0].provenance()
    for evaluation in evaluations:
        logger.info(f"{row_name(evaluation)}: {evaluation.network_line()}")
        rows.append(row(evaluation, folder))
        for key, heading in table.columns(cfg):
            logger.info(f"  {heading}: {table.cell(rows[-1]['figures'][key])} %")
        distributed.on_main(lambda: write(folder, rows, provenance, cfg))
    logger.info(f"written: {folder}/table.md, results.json")
    distributed.stop()


def write(folder: Path, rows: list[dict], provenance: dict, cfg: Node) -> None:
    """The rows so far."""
    write_json(folder / "results.json", {"rows": rows} | provenance)
    write_text(folder / "table.md", table.markdown(rows, provenance, cfg))


def row(evaluation: Evaluation, folder: Path) -> dict:
    """Figures of one network over the seeds, each a mean, a deviation and its values."""
    figures: dict[str, list[float]] = {}
    details, unreadable = [], {}
    for network, seed, is_new in networks(evaluation, folder):
        if is_new:
            found = protocols(network)
            details.append(found)
            for key, value in flat(found).items():
                figures.setdefault(key, []).append(value)
        for share in table.shares_of(network.cfg):
            own = folder / "probes" / probe_identity(network) / f"seed_{seed}"
            probed = run_linear(network, share, seed, share_folder(own, share))
            details.append(probed)
            figures.setdefault(f"linear_{share:g}", []).append(probed["top1"])
        unreadable |= network.bad
    return {
        "name": row_name(evaluation),
        "network": evaluation.network_line(),
        "weights": asdict(evaluation.source.weights),
        "image_size": {"crop": evaluation.size, "resize": evaluation.resize},
        "figures": {key: table.spread(values) for key, values in figures.items()},
        "details": details,
        "unreadable_images": unreadable,
    }


def networks(evaluation: Evaluation, folder: Path) -> Iterator[tuple[Evaluation, int, bool]]:
    """The network to probe with each seed, and whether it is another than with the seed before.

    A random initialisation is drawn anew for every seed. Features are kept in the table's folder.
    """
    cfg, source = evaluation.cfg, evaluation.source
    network = kept(evaluation, folder)
    for index, seed in enumerate(range(cfg.SEED, cfg.SEED + cfg.EVAL.SEEDS)):
        if source.weights.is_random:
            network = kept(replace(evaluation, source=random_like(source, seed)), folder)
        yield network, seed, index == 0 or source.weights.is_random


def protocols(evaluation: Evaluation) -> dict[str, dict]:
    """k-NN and retrieval."""
    # The probe's features hold the image feature too: they are extracted first, and once.
    linear = evaluation.cfg.LINEAR
    for split in SPLITS if linear.FEATURES == "cached" else ("test",):
        evaluation.features(split, linear.N_LAST_BLOCKS, linear.AVGPOOL_PATCHTOKENS)
    return {
        "knn": run_knn(evaluation).figures,
        "retrieval": run_retrieval(evaluation).figures,
    }


def flat(found: dict[str, dict]) -> dict[str, float]:
    """The figures that have a column or could have one, by key."""
    names = ("rank1", "rank5", "map", "map_at_100_released")
    return {
        **{f"knn_{k}": figures["top1"] for k, figures in found["knn"]["k"].items()},
        **{f"knn_{k}_top5": figures["top5"] for k, figures in found["knn"]["k"].items()},
        **{name: found["retrieval"][name] for name in names},
    }


def zeros(evaluations: list[Evaluation]) -> list[Evaluation]:
    """A random initialisation for each shape of network and image size among these."""
    found: dict[tuple, Evaluation] = {}
    for evaluation in evaluations:
        shape = (repr(evaluation.source.shape(evaluation.cfg.EVAL.POOLING)), evaluation.size)
        if shape not in found:
            source = random_like(evaluation.source, evaluation.cfg.SEED)
            found[shape] = replace(evaluation, source=source)
    return list(found.values())


def kept(evaluation: Evaluation, folder: Path) -> Evaluation:
    """The same, its features kept in the table's folder; nothing held yet."""
    own = folder / "features" / identity(evaluation)
    return build_evaluation(
        evaluation.cfg, evaluation.world, evaluation.source, evaluation.splits, own
    )


def identity(evaluation: Evaluation) -> str:
    """A folder's name for a network at a size."""
    return digest([evaluation.source.identity(evaluation.cfg.EVAL.POOLING), evaluation.size])


def probe_identity(evaluation: Evaluation) -> str:
    """A folder's name for a network's probes with these options."""
    cfg = evaluation.cfg
    settings = config.to_dict(cfg)["LINEAR"]
    del settings["LABEL_SHARES"]
    batch = cfg.EVAL.BATCH_SIZE_PER_GPU * evaluation.world.size
    more = [evaluation.resize, cfg.EVAL.PRECISION, batch]
    return digest([identity(evaluation), settings, more])


def digest(contents: list) -> str:
    """A short name for plain data."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def row_name(evaluation: Evaluation) -> str:
    """The checkpoint's path, with the key where it is not the teacher; or what is random."""
    weights = evaluation.source.weights
    if weights.is_random:
        return f"{RANDOM} ({weights.arch}, {evaluation.size} px)"
    is_usual = weights.key in ("teacher", NO_KEY)
    return weights.path if is_usual else f"{weights.path} ({weights.key})"


if __name__ == "__main__":
    run_script(main, if_interrupted="the same command goes on where it stopped")
