"""The evaluation scripts called in the test's process or as one of their own, and small data."""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import eval_knn
import eval_linear
import eval_retrieval
import evaluate
from tests.conftest import Done, refusal_of
from tests.datasets import benchmark_trees as trees
from tests.runs import pretraining, shake, small_config
from utils import checkpoint
from utils.errors import run_script

SCRIPTS = {
    "knn": eval_knn,
    "retrieval": eval_retrieval,
    "linear": eval_linear,
    "table": evaluate,
}
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


def blobs(
    seed: int, n: int, classes: int = 7, width: int = 12, noise: float = 1.5, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Features float32 [n, width] around the same centres for every seed, and labels [n]."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, n)
    centres = spread * np.random.default_rng(0).standard_normal((classes, width))
    values = centres[labels] + noise * draw.standard_normal((n, width))
    return torch.from_numpy(values).float(), torch.from_numpy(labels)


def tied(seed: int, n: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Features [n, 16] whose cosines are exact in float32 and mostly equal, and labels [n]."""
    draw = np.random.default_rng(seed)
    values = draw.choice([-1.0, 1.0], (n, 16)).astype(np.float32)
    return torch.from_numpy(values), torch.from_numpy(draw.integers(0, classes, n))


def regression(c: float = 1.0) -> Pipeline:
    """scikit-learn's logistic regression on standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))


def save_run(path: Path, **options) -> dict:
    """A checkpoint of this project whose student and teacher differ everywhere; its contents."""
    run = pretraining(small_config(**options))
    shake(run.student, 1)
    shake(run.teacher, 2)
    for network in (run.student, run.teacher):
        if network.pool is not None:  # after so few steps it is nearly even
            score = network.pool.score.weight.data
            score.copy_(torch.linspace(-1, 1, score.numel())[None])
    run.step = 8
    checkpoint.save(run.state(), path)
    return torch.load(path, weights_only=True)


def call(name: str, *words) -> Done:
    """Run a script's main in this process, as its last lines do."""
    line = " ".join(map(str, words)).split()
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv
    sys.argv = [f"{SCRIPTS[name].__name__}.py", *line, "--num_workers", "0", "--device", "cpu"]
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
    return refusal_of(call(name, *words)).removeprefix("error: ")


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
