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
from dataclasses import asdict, replace
from pathlib import Path

from engine import encoder, table
from engine.encoder import Source
from engine.evaluation import Evaluation, build_evaluation, join, open_splits
from engine.probing import run_linear
from engine.protocols import run_knn, run_retrieval
from utils import cli, distributed, flags
from utils.config import Node
from utils.distributed import World
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
    if world.is_main:
        make_folder(folder)

    # The rows: all networks are opened before any work.
    sources = [encoder.load(path, cfg, command.typed) for path in paths]
    splits = open_splits(cfg, world)
    evaluations = [build_evaluation(cfg, world, source, splits, None) for source in sources]
    for evaluation in evaluations:
        linear = cfg.LINEAR
        encoder_of_probe = evaluation.encoder(linear.N_LAST_BLOCKS, linear.AVGPOOL_PATCHTOKENS)
        encoder_of_probe.widths(evaluation.size)
    names = [row_name(source) for source in sources]
    for evaluation in zeros(evaluations):
        names.append(f"{encoder.RANDOM} ({evaluation.source.weights.arch})")
        evaluations.append(evaluation)

    # The three protocols for each; what is done is written row by row.
    rows = []
    for name, evaluation in zip(names, evaluations, strict=True):
        logger.info(f"{name}:")
        rows.append(row(name, evaluation, folder, world))
        for key, heading in table.columns(cfg):
            logger.info(f"  {heading}: {table.cell(rows[-1]['figures'][key])} %")
        if world.is_main:
            provenance = evaluations[0].provenance()
            write_json(folder / "results.json", {"rows": rows} | provenance)
            write_text(folder / "table.md", table.markdown(rows, provenance, cfg))
    logger.info(f"written: {folder / 'table.md'} and results.json beside it")
    distributed.stop()


def row(name: str, evaluation: Evaluation, folder: Path, world: World) -> dict:
    """Figures of one network over the seeds, each a mean, a deviation and its values."""
    cfg = evaluation.cfg
    is_random = evaluation.source.weights.path == encoder.RANDOM
    figures: dict[str, list[float]] = {}
    details = []
    current = None
    for seed in range(cfg.SEED, cfg.SEED + cfg.EVAL.SEEDS):
        if current is None or is_random:
            current = seeded(evaluation, seed, folder) if is_random else kept(evaluation, folder)
            found = protocols(current)
            details.append(found)
            for key, value in flat(found).items():
                figures.setdefault(key, []).append(value)
        for share in table.shares_of(cfg):
            label = f"labels_{100 * share:g}_percent"
            own = folder / "probes" / identity(current) / label / f"seed_{seed}"
            if world.is_main:
                make_folder(own)
            distributed.barrier()
            probed = run_linear(current, share, seed, own)
            details.append(probed)
            figures.setdefault(f"linear_{share:g}", []).append(probed["top1"])
    return {
        "name": name,
        "weights": asdict(evaluation.source.weights),
        "image_size": {"crop": evaluation.size, "resize": evaluation.resize},
        "figures": {key: table.spread(values) for key, values in figures.items()},
        "details": details,
        "unreadable_images": current.bad,
    }


def protocols(evaluation: Evaluation) -> dict[str, dict]:
    """k-NN and retrieval."""
    # The probe's features hold the image feature too: they are extracted first, and once.
    for split in ("test", "train")[: 2 if evaluation.cfg.LINEAR.FEATURES == "cached" else 1]:
        linear = evaluation.cfg.LINEAR
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
    """One evaluation to be seeded for each shape of network and image size among these."""
    found: dict[tuple, Evaluation] = {}
    for evaluation in evaluations:
        shape = (repr(evaluation.source.weights.backbone), evaluation.size)
        if shape not in found:
            source = encoder.random_like(evaluation.source, evaluation.cfg)
            found[shape] = replace(evaluation, source=source)
    return list(found.values())


def seeded(evaluation: Evaluation, seed: int, folder: Path) -> Evaluation:
    """The same with the random initialisation of `seed`."""
    own: Node = evaluation.cfg.clone()
    own.SEED = seed
    source = encoder.random_like(evaluation.source, own)
    return kept(replace(evaluation, source=source), folder)


def kept(evaluation: Evaluation, folder: Path) -> Evaluation:
    """The same, its features kept in the table's folder; nothing held yet."""
    own = folder / "features" / identity(evaluation)
    return build_evaluation(
        evaluation.cfg, evaluation.world, evaluation.source, evaluation.splits, own
    )


def identity(evaluation: Evaluation) -> str:
    """A folder's name for a network at a size."""
    weights = evaluation.source.weights
    text = f"{weights.sha256} {weights.key} {weights.backbone} {evaluation.size}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_name(source: Source) -> str:
    """The checkpoint's path, with the key where it is not the teacher."""
    weights = source.weights
    return weights.path if weights.key == "teacher" else f"{weights.path} ({weights.key})"


if __name__ == "__main__":
    run_script(main)
