"""Small images, a network of a few thousand weights, and a run of main_cmd.py with both."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from utils.errors import run_script
from utils.signals import STOP_SIGNALS

# What imports torch is imported where it is used: the process that hands tests to others does
# without. Those that run them, and all that these start, keep to one core.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent
TRAINED = "LOSS.OBJECTIVE cmd TRAIN.EPOCHS 4 SEED 3 PRINT_FREQ 1 CKPT.KEEP_EVERY 1"
NETWORK = """
    MODEL.ARCH vit_small MODEL.EMBED_DIM 32 MODEL.DEPTHS [2] MODEL.NUM_HEADS [2]
    MODEL.PATCH_SIZE 8 MODEL.IMG_SIZE 32
    AUG.GLOBAL_CROPS_SIZE 32 AUG.LOCAL_CROPS_NUMBER [2] AUG.LOCAL_CROPS_SIZE [16]
    HEAD.OUT_DIM 64 HEAD.HIDDEN_DIM 48 HEAD.BOTTLENECK_DIM 16 HEAD.POOL_HIDDEN 8
    TRAIN.BATCH_SIZE_PER_GPU 8 TRAIN.WARMUP_EPOCHS 0 TRAIN.BASE_LR 0.05
    DATA.WORKERS 0 DEVICE cpu
"""

Run = subprocess.CompletedProcess


def save_images(folder: Path, count: int, seed: int) -> None:
    """`count` noisy images of 48x48 pixels in one hue."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        draw = np.random.default_rng((seed, index))
        pixels = draw.integers(0, 120, (48, 48, 3)) + 135 * np.eye(3, dtype=int)[seed % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02d}.png")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> None:
    """The user's cache folder, instead of the real one, where matplotlib has its list of fonts."""
    os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def own_handlers():
    """The handlers of signals as they were, whatever a test has left."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def told(caplog, monkeypatch):
    """caplog, with all that the log tells people."""
    log = logging.getLogger("cmd")
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, log.name)
    return caplog


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """16 images in the class subfolders red and green."""
    root = tmp_path_factory.mktemp("images")
    save_images(root / "red", 8, 0)
    save_images(root / "green", 8, 1)
    return root


@pytest.fixture(scope="session")
def network_options() -> str:
    """KEY VALUE pairs of the tiny network and its crops."""
    return NETWORK


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """One thread a process, none of a launcher's variables."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_")
    kept = {name: v for name, v in os.environ.items() if not name.startswith(launchers)}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def command(images) -> Callable[..., list[str]]:
    """What follows `python` for a tiny run: command(folder, "KEY VALUE ...", launcher, flags)."""

    def make(output, options: str = "", launcher=(), flags=()) -> list[str]:
        pairs = f"{NETWORK} DATA.PATH {images} OUTPUT_DIR {output} {options}".split()
        return [*launcher, "main_cmd.py", *flags, *pairs]

    return make


@pytest.fixture(scope="session")
def pretrain(command, environment) -> Callable[..., Run]:
    """Run the tiny command as a process, or several; it must succeed unless `fails`."""
    from tests.processes import run_group, run_python

    def run(output, options: str = "", fails: bool = False, processes: int = 1, flags=()) -> Run:
        words, code = command(output, options, flags=flags), None if fails else 0
        if processes > 1:
            return run_group(processes, *words, environment=environment, code=code)
        return run_python(*words, environment=environment, code=code)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, pretrain, knn_options) -> Path:
    """The folder of a run of CMD: 4 epochs of 2 steps, each epoch's checkpoint kept."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    pretrain(folder, f"{TRAINED} {knn_options}")
    return folder


@pytest.fixture(scope="session")
def knn_options(images) -> str:
    return (
        f"EVAL.KNN_EVERY 2 EVAL.KNN_TRAIN {images} EVAL.KNN_VAL {images} EVAL.SIZE 32 EVAL.KNN_K 3"
    )


class Done(NamedTuple):
    """How a script ended inside this process, and what it wrote."""

    code: int
    out: str
    err: str


def refusal_of(done: Done) -> str:
    """The one line on stderr of a script that refuses."""
    assert done.code == 2, done
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def called(capfd, monkeypatch) -> Callable[..., Done]:
    """A script's main in this process, as its last lines run it: called(script, *words)."""

    def call(script: ModuleType, *words) -> Done:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        code = 0
        try:
            run_script(script.main)
        except SystemExit as end:
            code = end.code
        return Done(code, *capfd.readouterr())

    return call


@pytest.fixture
def refuse(command, called) -> Callable[..., str]:
    """main_cmd.py's one line on stderr for a command that it refuses, inside this process."""
    import main_cmd

    def run(folder, options: str = "", flags=()) -> str:
        _, *words = command(folder, options, flags=flags)
        done = called(main_cmd, *words)
        assert "loss" not in done.out
        return refusal_of(done)

    return run
