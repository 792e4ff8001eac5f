"""A study: many pretraining cells with paired seeds on one data set, under one protocol.

    python compare.py --study experiments/studies/objectives.yaml --output_dir OUT
    python compare.py --study FILE --output_dir OUT --cells cmd,esvit --seeds 0 1
    python compare.py --study FILE --output_dir OUT --table      # runs nothing
KEY VALUE pairs at the end are laid over every cell. Each cell and seed is pretrained by a process
of main_cmd.py and evaluated here; the same command goes on where it stopped, and what is done is
not done again. Written into OUT: results.json, table.md and curves.png after every cell, one JSON
for each in results/, the runs in runs/CELL/seedK, rendered images in data/. Several commands may
share OUT, each with its own --cells or --seeds; tables are of all that is in results/.
docs/studies.md shows what a study's file holds.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from datasets import synthetic
from datasets.fine_grained import load_splits
from datasets.folder import refuse_among_images
from datasets.splits import Splits
from engine.evaluation.feature_cache import SplitFeatures
from engine.evaluation.features import Reading
from engine.evaluation.provenance import provenance
from engine.evaluation.source import Source, load_source
from engine.pictures.curves import read_log
from engine.pictures.drawing import evenly
from engine.studies import tables
from engine.studies.evaluation import figures_and_zeros
from engine.studies.results import StudyResults
from engine.studies.runs import Run, pretrained, run_of
from engine.studies.spec import Study, choose, load
from engine.studies.zeros import untrained_source
from utils import checkpoint, cli, config, distributed, logging
from utils.config import Node
from utils.distributed import World
from utils.errors import InputError, run_script
from utils.files import make_folder
from utils.logging import logger
from utils.signals import Preempted, StopSignals

CURVE_LINES = 5  # of a run's log that its result keeps
SHORT = ("knn_default", "linear", "coarse_knn_default", "pointing_mil")  # shown as a run ends


def main() -> None:
    with StopSignals() as signals:
        arguments, study = parse()
        try:
            compare(arguments, study)
        except Preempted:
            raise Preempted(
                f"stopped by {signals.received}: what is done is in {arguments.output_dir}, and "
                f"the same command goes on with the rest."
            ) from None


def parse() -> tuple[argparse.Namespace, Study]:
    """The command line, and the study with its KEY VALUE pairs laid over all cells."""
    parser = cli.Parser(
        usage="%(prog)s --study FILE --output_dir FOLDER [flags] [KEY VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, one = parser.add_argument, cli.at_least(1)
    add("--study", type=Path, required=True, help="a YAML of experiments/studies")
    add("--output_dir", type=Path, required=True, help="the study's folder")
    add("--data_path", type=Path, help="train and val, where the set is a folder")
    add("--cells", nargs="+", metavar="CELL", help="these alone, e.g. cmd,esvit")
    add("--seeds", nargs="+", type=cli.at_least(0), metavar="SEED", help="these alone")
    add("--jobs", type=one, default=1, help="cells at a time [1]")
    add("--processes", type=one, default=1, help="of each run, by torchrun [1]")
    add("--table", action="store_true", help="write the tables; run nothing")
    words, pairs = cli.split_pairs(sys.argv[1:], ["--table"])
    arguments = parser.parse_args(words)
    study = load(arguments.study, pairs)
    cells = [name for word in arguments.cells or study.cells for name in word.split(",") if name]
    arguments.cells = list(dict.fromkeys(choose(cells, study.cells, "--cells")))
    arguments.seeds = list(dict.fromkeys(arguments.seeds or study.seeds))
    arguments.output_dir = arguments.output_dir.expanduser()
    return arguments, study


def compare(arguments: argparse.Namespace, study: Study) -> None:
    logging.setup(is_main=True)
    world = distributed.start(config.get(study.config(arguments.cells[0]), "DEVICE"))
    if world.size > 1:
        raise InputError(
            f"compare.py is one process and was started as {world.size}: leave the launcher out, "
            f"and give --processes for several to a run."
        )
    output, processes = arguments.output_dir, arguments.processes
    results = StudyResults(study, output, processes)
    if arguments.table:
        if not results.finished():
            raise InputError(f"{output} holds no finished cell of {study.path}.")
        write_tables(results)
        return

    # Data, and what is done on it: what does not fit is refused before anything runs.
    for name in dict.fromkeys(study.cells[cell].data for cell in arguments.cells):
        results.splits[name] = open_data(study, name, arguments.data_path, output)
    make_folder(output)
    finished = results.finished()
    waiting = [
        run_of(study, cell, seed, results.splits[study.cells[cell].data], output, processes)
        for cell, seed in study.runs(arguments.cells, arguments.seeds)
        if (cell, seed) not in finished
    ]
    for run in waiting:
        run.refuse_other()

    # Untrained networks first: where an evaluation cannot work, hours of training are spared.
    failed: dict[str, str] = {}  # why, by the run's name
    for row in results.untrained.values():
        seeds = [0] if row.is_start else arguments.seeds
        for seed in seeds if set(row.cells) & set(arguments.cells) else ():
            if (row.name, seed) not in finished:
                with noted(f"{row.name}-seed{seed}", failed):
                    evaluate(results, row.name, seed, world)
    total = len(arguments.cells) * len(arguments.seeds)
    logger.info(f"{study.name}: {total} runs, of which {total - len(waiting)} are done")
    write_tables(results)
    with closing(pretrained(waiting, arguments.jobs)) as ended:
        for run, code in ended:
            if code:
                failed[run.name] = f"exit code {code}, {run.tail()[-1:] or ['no word']}"
                logger.warning("\n  ".join([f"{run.name}: exit code {code}", *run.tail()]))
            else:
                with noted(run.name, failed):
                    evaluate(results, run.cell, run.seed, world, run)
            write_tables(results)
    if failed:
        listed = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise InputError(f"{len(failed)} of the study's runs failed: {listed}")


@contextmanager
def noted(name: str, failed: dict[str, str]) -> Iterator[None]:
    """What the user can mend is noted under the run's name, and the other runs go on."""
    try:
        yield
    except InputError as error:
        failed[name] = str(error)
        logger.warning(f"{name}: {error}")


def open_data(study: Study, name: str, folder: Path | None, output: Path) -> Splits:
    """A data set's images: rendered into `output` unless they are there, or the user's folder."""
    data = study.data[name]
    if data.images is not None:
        folder = output / "data" / name
        make_folder(folder.parent)
        if synthetic.write_folder(data.images, data.seed, folder, data.train, data.val):
            logger.info(f"{name}: {data.train} and {data.val} images written to {folder}")
    if folder is None:
        raise InputError(f"{study.path} is on images of yours: give --data_path.")
    splits = load_splits("folder", str(folder), False)
    refuse_among_images(output, splits.train, splits.test)
    for note in splits.notes:
        logger.warning(note)
    return splits


def evaluate(
    results: StudyResults, name: str, seed: int, world: World, run: Run | None = None
) -> None:
    """Write the result of a random row, or of the network that a cell's run has left."""
    study = results.study
    row = results.untrained[name] if run is None else study.cells[name]
    cfg = study.config(name if run else row.cells[0], seed)
    source, about = trained(run, cfg) if run else (untrained_source(study, row, seed), {})
    splits, reading = results.splits[row.data], Reading.of(cfg, world, source)
    with quiet():
        figures, zeros, remarks = figures_and_zeros(source, splits, reading, cfg, study.protocol)
    behind = provenance(cfg, SplitFeatures(source, splits, reading))
    known = ("command", "date", "commit", "versions", "device", "data")
    result = {
        "study": study.name,
        "name": name,
        "seed": seed,
        "data_set": row.data,
        "figures": figures,
        "zeros": zeros,
        "remarks": remarks,
        **{key: behind[key] for key in known},
        **about,
    }
    if run:
        result |= {"base": row.base.name, "options": row.options}
    results.write(name, seed, result)
    shown = [f"{column} {figures[column]:.2f}" for column in SHORT if column in figures]
    logger.info(f"{name}-seed{seed}: {', '.join(shown)}")


def trained(run: Run, cfg: Node) -> tuple[Source, dict]:
    """The network that a run has left, and how it was trained."""
    path = run.folder / checkpoint.LAST
    source, state = load_source(path, cfg.INIT.CHECKPOINT_KEY), checkpoint.load_own(path)
    log = read_log(run.folder / "log.txt")
    logged = [line for line in log if "loss" in line]
    pretraining = {
        "command": run.written,
        "steps": state["step"],
        "epochs": state["epoch"],
        "images_per_step": state["images_per_step"],
        "seconds_of_steps": seconds_of_steps(log, state["images_per_step"]),
        "versions": state["versions"],
    }
    return source, {
        "pretraining": pretraining,
        "curve": [logged[place] for place in evenly(len(logged), CURVE_LINES)],
        "checkpoint_sha256": source.weights.sha256,
    }


def write_tables(results: StudyResults) -> None:
    """results.json, table.md and curves.png of all in results/."""
    command = shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
    found = results.finished(refuse=False)
    tables.write(results.study, results.untrained.values(), found, command, results.output)


@contextmanager
def quiet() -> Iterator[None]:
    """In the block only warnings are shown: an evaluation's own lines would fill the screen."""
    before = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(before)


def seconds_of_steps(lines: list[dict], images_per_step: int) -> float:
    """Seconds that a run's steps took, over all its processes, by the speeds in its log.

    Without what comes before the first step of each, k-NN tests and checkpoints.
    """
    seconds, before = 0.0, 0
    for line in lines:
        if line.get("images_per_second"):
            seconds += (line["step"] - before) * images_per_step / line["images_per_second"]
            before = line["step"]
    return round(seconds, 1)


if __name__ == "__main__":
    run_script(main, "the same command goes on where it stopped")
