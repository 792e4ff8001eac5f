"""What is done of a study: one JSON for each network under OUT/results, and what it is of."""

import json
import re
from pathlib import Path
from typing import Any

from datasets.splits import Splits
from engine.evaluation.provenance import SPLITS
from engine.studies.spec import NOT_READ, Study
from engine.studies.zeros import untrained_rows
from utils import config
from utils.errors import InputError
from utils.files import make_folder, write_json
from utils.logging import logger
from utils.options import FIGURES, SHAPES, WEIGHTS

_FILE = re.compile(r"(.+)-seed(\d+)\.json")

Results = dict[tuple[str, int], dict]  # (cell or random row, seed) -> its JSON


class StudyResults:
    """The results of a study in its folder `output`; its runs have so many `processes`.

    untrained: its rows of untrained networks by name. splits: the images of the data sets that are
    open.
    """

    def __init__(self, study: Study, output: Path, processes: int = 1) -> None:
        self.study, self.output, self.processes = study, output, processes
        self.untrained = untrained_rows(study)
        self.splits: dict[str, Splits] = {}

    def finished(self, refuse: bool = True) -> Results:
        """What is there and fits: in options, and in images where the data are open.

        A random network that does not fit is left out: it is made again in seconds. For a cell
        that does not an InputError; unless `refuse` it is left out too.
        """
        found = {}
        for path in sorted((self.output / "results").glob("*.json")):
            named = _FILE.fullmatch(path.name)
            name, seed = (named[1], int(named[2])) if named else ("", 0)
            if name not in self.study.cells and name not in self.untrained:
                continue  # of the study as it was
            result = _read(path)
            different = misfit(result["identity"], self.identity(name, seed), path)
            if not different:
                found[name, seed] = result
            elif refuse and name in self.study.cells:
                raise InputError(
                    f"{path} is of another study: {different}. Use the study as it was, another "
                    f"--output_dir, or remove this file (and, if an option of the training "
                    f"differs, the run's folder) to have it made again."
                )
            elif refuse:
                logger.warning(f"{path} is of another study and left out: {different}")
        return found

    def write(self, name: str, seed: int, result: dict) -> None:
        """Write the result of a cell or a random row whole, and what it is of."""
        path = self.output / "results" / f"{name}-seed{seed}.json"
        make_folder(path.parent)
        write_json(path, result | {"identity": self.identity(name, seed)}, "result")

    def identity(self, name: str, seed: int) -> dict:
        """What decides the figures of a cell or a random row; plain data."""
        protocol = self.study.protocol
        known: dict = {"evaluate": {"poolings": list(protocol.poolings), "k": protocol.k}}
        if name in self.untrained:
            row = self.untrained[name]
            known["network"] = row.shape
        else:
            row = self.study.cells[name]
            known["options"] = config.to_dict(self.study.config(name, seed))
            known["processes"] = self.processes
        if row.data in self.splits:
            splits = self.splits[row.data]
            known["images"] = {split: getattr(splits, split).fingerprint for split in SPLITS}
        return known


def misfit(stored: dict, wanted: dict, where: Path, weights_only: bool = False) -> str:
    """In what an identity that is stored at `where` differs from the wanted one; "" if it fits.

    weights_only: options that decide figures but no weights may differ.
    """
    differences = [
        f"{name} (was {in_words(stored.get(name))}, now {in_words(value)})"
        for name, value in wanted.items()
        if name != "options" and stored.get(name) != value
    ]
    if "options" in wanted:
        decisive = config.deciding(SHAPES, WEIGHTS, *(() if weights_only else (FIGURES,)))
        was, now = (config.from_dict(tree.get("options"), str(where)) for tree in (stored, wanted))
        skipped = {*NOT_READ, *config.unread(was, now)}
        differences += [
            f"{name} (was {config.get(was, name)}, now {config.get(now, name)})"
            for name in config.differing(was, now, decisive)
            if name not in skipped
        ]
    return "; ".join(differences)


def _read(path: Path) -> dict:
    try:
        contents = json.loads(path.read_text())
        if all(isinstance(contents[part], dict) for part in ("figures", "zeros", "identity")):
            return contents
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise InputError(f"{path} is not a result of a study: remove it to have it made again.")


def in_words(value: Any) -> str:
    """Plain data on one line, long texts cut."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(inner)}" for key, inner in value.items())
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
