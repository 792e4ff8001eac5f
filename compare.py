"""A study: many pretraining cells with paired seeds on one data set, under one protocol.

    python compare.py --study experiments/studies/objectives.yaml --output_dir OUT
    python compare.py --study FILE --output_dir OUT --cells cmd,esvit --seeds 0 1
    python compare.py --study FILE --output_dir OUT --table      # runs nothing
KEY VALUE pairs at the end are laid over every cell. Each cell and seed is pretrained by a process
of main_cmd.py and evaluated here; the same command goes on where it stopped, and what is done is
not done again. Written into OUT: results.json, table.md and curves.png after every cell, one JSON
for each in results/, the runs in runs/CELL/seedK, rendered images in data/. Several commands may
share OUT, each with its own --cells or --seeds; tables are of all that is in results/.
engine/studies/study.py says what a study's file holds.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from datasets import synthetic
from datasets.benchmarks import Splits
from datasets.fine_grained import load_splits
from engine.evaluation.provenance import SPLITS, provenance
from engine.evaluation.source import Source, load_source
from engine.pictures.curves import read_log
from engine.studies import study_evaluation, study_results, study_table
from engine.studies.study import Study, choose, load
from engine.studies.study_results import RandomRow
from engine.studies.study_runs import LOCK, Run, locked, pretrained, run_of
from utils import checkpoint, cli, config, distributed, logging
from utils.config import Node
from utils.distributed import World
from utils.errors import InputError, run_script
from utils.files import make_folder
from utils.logging import logger
from utils.signals import Preempted, StopSignals

CURVE_LINES = 5  # of a run's log that its result keeps


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
    parser.add_argument("--study", type=Path, required=True, help="a YAML of experiments/studies")
    parser.add_argument("--output_dir", type=Path, required=True, help="the study's folder")
    parser.add_argument("--data_path", type=Path, help="train and val, where the set is a folder")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="these alone, e.g. cmd,esvit")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="these alone")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time [1]")
    parser.add_argument("--processes", type=int, default=1, help="of each run, by torchrun [1]")
    parser.add_argument("--table", action="store_true", help="write the tables; run nothing")
    words, pairs = cli.split_pairs(sys.argv[1:], ["--table"])
    arguments = parser.parse_args(words)
    for name in ("jobs", "processes"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(arguments, name)}.")
    if any(seed < 0 for seed in arguments.seeds or ()):
        raise InputError(f"--seeds must be at least 0, not {arguments.seeds}.")
    study = load(arguments.study).overlaid(pairs)
    cells = [name for word in arguments.cells or study.cells for name in word.split(",") if name]
    arguments.cells = list(dict.fromkeys(choose(cells, study.cells, "--cells")))
    arguments.seeds = list(dict.fromkeys(arguments.seeds or study.seeds))
    arguments.output_dir = arguments.output_dir.expanduser()
    return arguments, study


def compare(arguments: argparse.Namespace, study: Study) -> None:
    logging.setup(is_main=True)
    device = config.get(study.config(next(iter(study.cells))), "DEVICE")
    work = Work(study, arguments.output_dir, arguments.processes, distributed.start(device))
    work.read_finished()
    if arguments.table:
        if not work.finished:
            raise InputError(f"{work.output} holds no finished cell of {study.path}.")
        work.write_tables()
        return

    # Data, and what is done of it: what misfits is refused before anything runs.
    make_folder(work.output)
    for name in {study.cells[cell].data: None for cell in arguments.cells}:
        work.open_data(name, arguments.data_path)
    work.read_finished()
    waiting = [
        work.run(cell, seed)
        for cell, seed in study.runs(arguments.cells, arguments.seeds)
        if (cell, seed) not in work.finished
    ]
    for run in waiting:
        run.refuse_other()

    # Random networks first: where an evaluation cannot work, hours of training are spared.
    for row in work.random:
        if not set(row.cells) & set(arguments.cells):
            continue
        for seed in arguments.seeds:
            if (row.name, seed) not in work.finished:
                work.attempt(
                    f"{row.name}-seed{seed}", lambda r=row, s=seed: work.judge_random(r, s)
                )
                work.write_tables()

    total = len(arguments.cells) * len(arguments.seeds)
    logger.info(f"{study.name}: {total} runs, of which {total - len(waiting)} are done")
    if not waiting:
        work.write_tables()
    with closing(pretrained(waiting, arguments.jobs)) as ended:
        for run, code, seconds in ended:
            if code:
                work.failed[run.name] = f"exit code {code}, {run.tail()[-1:] or ['no word']}"
                logger.warning("\n  ".join([f"{run.name}: exit code {code}", *run.tail()]))
            else:
                work.attempt(run.name, lambda r=run, s=seconds: work.judge(r, s))
            work.write_tables()
    if work.failed:
        listed = "; ".join(f"{name} ({reason})" for name, reason in work.failed.items())
        raise InputError(f"{len(work.failed)} of the study's runs failed: {listed}")


@dataclass
class Work:
    """A study under way. finished: (cell or random row, seed) -> its result.

    splits: of the data sets that are open; failed: why, by the run's name; left_out: the results
    that misfit and were told.
    """

    study: Study
    output: Path
    processes: int
    world: World
    finished: dict[tuple[str, int], dict] = field(default_factory=dict)
    splits: dict[str, Splits] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = study_results.random_rows(self.study)

    def read_finished(self, refuse: bool = True) -> None:
        """Take up what is in results/ and fits: options, and images where the data are open.

        InputError for a cell's that misfits; unless `refuse` it is left out, as a random
        network's always is, which is made again in seconds.
        """
        self.finished = {}
        randoms = [row.name for row in self.random]
        for name, seed in study_results.written(self.output):
            if name not in self.study.cells and name not in randoms:
                continue  # of the study as it was
            path = study_results.path_of(self.output, name, seed)
            found = study_results.read(path)
            if found is None:
                continue  # just removed
            misfit = study_results.misfit(found["identity"], self.identity(name, seed), path)
            if not misfit:
                self.finished[name, seed] = found
            elif refuse and name not in randoms:
                raise InputError(
                    f"{path} is of another study: {misfit}. Use the study as it was, another "
                    f"--output_dir, or remove this file (and, if an option of the training "
                    f"differs, the run's folder) to have it made again."
                )
            elif path not in self.left_out:
                self.left_out.add(path)
                logger.warning(f"{path} is of another study and left out: {misfit}")

    def identity(self, name: str, seed: int) -> dict:
        """What decides the figures of a cell or a random row; with the images of open data."""
        row = next((row for row in self.random if row.name == name), None)
        data = row.data if row else self.study.cells[name].data
        images = self.images(data) if data in self.splits else None
        if row:
            return study_results.random_identity(self.study, row, images)
        return study_results.identity(
            self.study, self.study.config(name, seed), self.processes, images
        )

    def open_data(self, name: str, folder: Path | None) -> None:
        """Render a data set, unless it is there, and list its images."""
        data = self.study.data[name]
        root = folder
        if data.images is not None:
            root = self.output / "data" / name
            show = logging.on_terminal()
            if synthetic.write_folder(
                data.images, data.seed, root, data.train, data.val, progress=show
            ):
                logger.info(f"{name}: {data.train} and {data.val} images written to {root}")
        if root is None:
            raise InputError(f"{self.study.path} is on images of yours: give --data_path.")
        self.splits[name] = load_splits("folder", str(root), False)
        for note in self.splits[name].notes:
            logger.warning(note)

    def images(self, data: str) -> dict[str, str]:
        """Fingerprints of a data set's splits."""
        splits = self.splits[data]
        return {split: getattr(splits, split).fingerprint for split in SPLITS}

    def run(self, cell: str, seed: int) -> Run:
        """The pretraining run of a cell."""
        splits = self.splits[self.study.cells[cell].data]
        return run_of(self.study, cell, seed, splits, self.output, self.processes)

    def attempt(self, name: str, judge: Callable[[], None]) -> None:
        """Evaluate; what the user can mend is told and noted, and the others go on."""
        try:
            judge()
        except InputError as error:
            self.failed[name] = str(error)
            logger.warning(f"{name}: {error}")

    def judge_random(self, row: RandomRow, seed: int) -> None:
        """Evaluate a randomly initialised network."""
        configs = [self.study.config(cell, seed) for cell in row.cells]
        source = study_evaluation.random_source(configs, seed)
        self._judge(row.name, seed, row.data, source, configs[0], {})

    def judge(self, run: Run, seconds: float) -> None:
        """Evaluate the teacher that a run has left."""
        data = self.study.cells[run.cell].data
        cfg = self.study.config(run.cell, run.seed)
        path = run.folder / checkpoint.LAST
        source = load_source(path, cfg.INIT.CHECKPOINT_KEY)
        state = checkpoint.load_own(path)
        log = read_log(run.folder / "log.txt")
        about = {
            "pretraining": {
                "command": run.written,
                "steps": state["step"],
                "epochs": state["epoch"],
                "images_per_step": state["images_per_step"],
                "seconds_of_steps": seconds_of_steps(log, state["images_per_step"]),
                "seconds_of_last_process": round(seconds, 1),
                "versions": state["versions"],
            },
            "curve": few([line for line in log if "loss" in line]),
            "checkpoint_sha256": source.weights.sha256,
            "base": self.study.cells[run.cell].base.name,
            "options": self.study.cells[run.cell].options,
        }
        self._judge(run.cell, run.seed, data, source, cfg, about)

    def _judge(
        self,
        name: str,
        seed: int,
        data: str,
        source: Source,
        cfg: Node,
        about: dict,
    ) -> None:
        splits, own = self.splits[data], cfg.clone()
        own.DATA.PATH = str(splits.train.root.parent)
        protocol = self.study.protocol
        with quiet():
            figures, zeros = study_evaluation.measure(source, own, protocol, splits, self.world)
        behind = provenance(own, self.world, source, splits)
        known = ("command", "date", "commit", "versions", "device", "data")
        result = {
            "study": self.study.name,
            "name": name,
            "seed": seed,
            "data_set": data,
            "figures": figures,
            "zeros": zeros,
            **{key: behind[key] for key in known},
            **about,
            "identity": self.identity(name, seed),
        }
        study_results.write(study_results.path_of(self.output, name, seed), result)
        shown = [
            f"{column} {figures[column]:.2f}" for column in study_table.SHORT if column in figures
        ]
        logger.info(f"{name}-seed{seed}: {', '.join(shown)}")

    def write_tables(self) -> None:
        """results.json, table.md and curves.png of all in results/.

        One command at a time: others that share the folder may have more results by now.
        """
        command = shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
        with locked(self.output / LOCK, wait=True):
            self.read_finished(refuse=False)
            there = sorted({seed for _, seed in self.finished})
            seeds = list(dict.fromkeys([*self.study.seeds, *there]))
            study_table.write(self.study, self.random, self.finished, seeds, command, self.output)


@contextmanager
def quiet() -> Iterator[None]:
    """In the block only warnings are told: an evaluation's own lines would fill the screen."""
    before = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(before)


def few(lines: list[dict]) -> list[dict]:
    """CURVE_LINES of them, the first and the last among these."""
    last = len(lines) - 1
    places = {round(last * part / (CURVE_LINES - 1)) for part in range(CURVE_LINES)}
    return [lines[place] for place in sorted(places)]


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
