"""The evaluation scripts called in the test's process or as one of their own, and small data."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import eval_knn
import eval_linear
import eval_retrieval
from tests.datasets import benchmark_trees as trees
from tests.processes import run_python
from utils.errors import run_script

SCRIPTS = {"knn": eval_knn, "retrieval": eval_retrieval, "linear": eval_linear}
CLASSES, TRAIN, TEST = 7, 5, 4
KNN_FIGURES = ("gallery_images", "test_images", "k", "classes", "temperature", "data")
RETRIEVAL_FIGURES = (
    "gallery_images",
    "queries",
    "queries_without_positives",
    "rank1",
    "rank5",
    "map",
    "map_at_100_released",
)


class Done(NamedTuple):
    code: int
    out: str
    err: str


def call(name: str, *words) -> Done:
    """Run a script's main in this process, as its last lines do."""
    line = " ".join(map(str, words)).split()
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv
    sys.argv = [f"eval_{name}.py", *line, "--num_workers", "0", "--device", "cpu"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(SCRIPTS[name].main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


def works(name: str, *words) -> str:
    done = call(name, *words)
    assert (done.code, done.err) == (0, ""), done
    return done.out


def refusal(name: str, *words) -> str:
    """The one line of a refusal."""
    done = call(name, *words)
    assert done.code == 2, done
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def process(environment: dict, *words, code: int = 0) -> Done:
    """Run a script as a process of its own."""
    done = run_python(*words, environment=environment, code=code)
    return Done(done.returncode, done.stdout, done.stderr)


def results(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def figures(folder: Path, name: str) -> dict:
    names = KNN_FIGURES if name == "knn" else RETRIEVAL_FIGURES
    return {key: results(folder, name)[key] for key in names}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_data(root: Path, classes: int = CLASSES, train: int = TRAIN, test: int = TEST) -> Path:
    """Train and val, whose classes share three hues unevenly: neither easy nor hopeless."""
    for label in range(classes):
        for n in range(train + test):
            split = "train" if n < train else "val"
            hue = (label + (n % 3 == 0)) % 3
            trees.save_image(root / split / f"class{label}" / f"{n}.jpg", hue, 100 * label + n)
    return root


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def assert_same_bits(first, second) -> None:
    """Tensors, in dicts too, of equal values and types; of all else equality."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same_bits(first[name], second[name])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
        assert first.dtype == second.dtype
    else:
        assert first == second
