"""Checkpoints from a stranger who means harm: refused in a line, and nothing of theirs runs."""

import argparse
import builtins
import collections
import functools
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

import eval_knn
import eval_linear
import eval_retrieval
import evaluate
import export
import main_cmd
import report
from engine.evaluation import feature_cache
from models import load_backbone
from tests.conftest import NETWORK, refusal_of
from tests.runs import checkpoint_of, pretraining, small_config
from utils import checkpoint
from utils.errors import InputError


class Runs:
    """Loaded naively, it runs a function."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.fixture
def harm(tmp_path) -> Path:
    """The file that a payload would write."""
    return tmp_path / "harm"


@pytest.fixture(scope="module")
def state() -> dict:
    """A run's state, in which the payload hides."""
    return checkpoint_of(pretraining(small_config()))


def zipped(contents, **how) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, **how)
    return file.getvalue()


legacy = functools.partial(zipped, _use_new_zipfile_serialization=False)
CONTAINERS = {"zip": zipped, "legacy": legacy, "pickle": pickle.dumps}


def hostile(state: dict, harm: Path, container: str) -> bytes:
    """A whole checkpoint but for one entry, which touches `harm` when it is loaded naively."""
    return CONTAINERS[container]({**state, "scaler": Runs(os.system, f"touch {harm}")})


def assert_refused(error: str, harm: Path) -> None:
    (line,) = error.splitlines()
    assert line.startswith("error: ")
    assert "is refused: it wants to run 'posix.system' while loading" in line or (
        "is not a checkpoint" in line  # a plain pickle is of no format that is read
    )
    assert not harm.exists()


# Every script


@pytest.fixture
def refusal(called, harm) -> Callable[[ModuleType, str], str]:
    """The line of a script, inside this process, that must refuse the file."""

    def run(script: ModuleType, words: str) -> str:
        line = refusal_of(called(script, *words.split()))
        assert_refused(line, harm)
        return line

    return run


def splits(folder: Path, images: Path) -> Path:
    """The images as both splits of a data set."""
    folder.mkdir()
    for split in ("train", "val"):
        (folder / split).symlink_to(images)
    return folder


DATA = "--data_path IN/images --output_dir IN/out --device cpu --num_workers 0"
TRAIN = f"--data_path IN/images {NETWORK}"
SCRIPTS = {
    "training goes on": (main_cmd, f"{TRAIN} --output_dir IN/run"),
    "training falls back": (main_cmd, f"{TRAIN} --output_dir IN/kept"),
    "training starts from": (
        main_cmd,
        f"{TRAIN} --output_dir IN/out --pretrained_weights_ckpt IN/weights.pth",
    ),
    "k-NN": (eval_knn, f"{DATA} --pretrained_weights IN/weights.pth"),
    "linear probe": (eval_linear, f"{DATA} --pretrained_weights IN/weights.pth"),
    "retrieval": (eval_retrieval, f"{DATA} --pretrained_weights IN/weights.pth"),
    "table": (evaluate, f"{DATA} --checkpoint IN/weights.pth"),
    "report": (report, "--output_dir IN/run --queries IN/images"),
    "export": (export, "IN/weights.pth IN/out --format timm"),
}


@pytest.fixture
def folder(tmp_path, images, state, harm) -> Callable[[str], Path]:
    """A folder in which every script finds the same hostile file."""

    def make(container: str) -> Path:
        data = hostile(state, harm, container)
        for name in ("weights.pth", "run/checkpoint.pth", "kept/checkpoint0001.pth"):
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        splits(tmp_path / "in" / "images", images)
        return tmp_path / "in"

    return make


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_refuses_it_in_a_line(name, folder, harm, refusal):
    script, words = SCRIPTS[name]
    refusal(script, words.replace("IN/", f"{folder('zip')}/"))
    pickle.loads(pickle.dumps(Runs(os.system, f"touch {harm}")))
    assert harm.exists(), "the payload is real"


@pytest.mark.parametrize("container", CONTAINERS)
def test_python_callers_get_an_error_of_ours(container, folder, harm):
    path = folder(container) / "weights.pth"
    for read in (load_backbone, checkpoint.load_file, checkpoint.load_own):
        with pytest.raises(InputError) as caught:
            read(path)
        assert_refused(f"error: {caught.value}", harm)
    with pytest.raises(InputError) as caught:
        checkpoint.newest_intact(path.parent / "run")
    assert_refused(f"error: {caught.value}", harm)


def test_kept_features_are_never_unpickled(tmp_path, state, harm):
    path = tmp_path / "train.safetensors"
    path.write_bytes(hostile(state, harm, "zip"))
    with pytest.raises(InputError, match="is not a feature file"):
        feature_cache.load(path)
    with pytest.raises(InputError, match="is not a safetensors file"):
        checkpoint.load_file(path)
    assert not harm.exists()


def test_a_probe_does_not_go_on_from_it(tmp_path, images, state, harm, refusal):
    checkpoint.save(state, tmp_path / "weights.pth")
    splits(tmp_path / "data", images)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "linear.pth").write_bytes(hostile(state, harm, "zip"))
    words = f"""
        --pretrained_weights {tmp_path}/weights.pth --data_path {tmp_path}/data
        --output_dir {tmp_path}/out --device cpu --num_workers 0 --n_last_blocks 1 --epochs 1
    """
    assert f"{tmp_path}/out/linear.pth is " in refusal(eval_linear, words)


# What is allowed by name, and what hides behind it


def plain_pickle(body: bytes) -> bytes:
    """A zip file of torch's whose pickle is this."""
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    writer.write_record("data.pkl", body, len(body))
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()
    return file.getvalue()


def calls(module: str, name: str, argument: bytes) -> bytes:
    """A pickle that calls module.name with one text."""
    text = b"X" + len(argument).to_bytes(4, "little") + argument
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + text + b"\x85R."


HIDDEN = {
    "a module's module": ("argparse", "_os.system"),
    "through the class": ("argparse", "Namespace.__init__.__globals__"),
    "as the allowed name": ("argparse.Namespace", "__init__"),
    "another of argparse": ("argparse", "FileType"),
    "another of numpy": ("numpy.core.multiarray", "fromstring"),
    "numpy's files": ("numpy", "memmap"),
    "numpy's unpickler": ("numpy", "load"),
    "code": ("builtins", "exec"),
    "an expression": ("builtins", "eval"),
    "code under Python 2's name": ("__builtin__", "eval"),
    "attributes": ("builtins", "getattr"),
    "files": ("io", "open"),
    "processes": ("subprocess", "Popen"),
    "the shell": ("os", "system"),
    "the shell under its own name": ("posix", "system"),
    "torch's own loader": ("torch", "load"),
    "torch's code": ("torch.utils.model_zoo", "load_url"),
    "imports": ("importlib", "import_module"),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_only_the_allowed_names_are_called(kind, tmp_path, harm):
    module, name = HIDDEN[kind]
    path = tmp_path / "file.pth"
    path.write_bytes(plain_pickle(calls(module, name, f"touch {harm}".encode())))
    with pytest.raises(checkpoint.NotIntact, match="is refused: it wants to run '") as caught:
        checkpoint.load_file(path)
    assert "\n" not in str(caught.value)
    assert not harm.exists()


def test_a_namespace_keeps_what_it_is_given_and_runs_none_of_it(tmp_path, harm):
    options = argparse.Namespace(arch="x")
    options.__dict__["__class__"] = "text"
    options.__dict__["__setstate__"] = "text"
    (tmp_path / "plain.pth").write_bytes(zipped({"args": options}))
    assert checkpoint.load_file(tmp_path / "plain.pth")["args"].arch == "x"
    options.callback = Runs(os.system, f"touch {harm}")
    (tmp_path / "file.pth").write_bytes(zipped({"args": options}))
    with pytest.raises(checkpoint.NotIntact, match=r"wants to run 'posix\.system'"):
        checkpoint.load_file(tmp_path / "file.pth")
    assert not harm.exists()


@pytest.mark.parametrize(
    "value",
    [np.float64(0.5), np.float32(0.25), np.int64(3), np.int32(4), np.bool_(True)],
    ids=lambda value: type(value).__name__,
)
def test_numpys_numbers_load(tmp_path, value):
    for write in (zipped, legacy):
        (tmp_path / "file.pth").write_bytes(write({"lr": value, "more": collections.OrderedDict()}))
        loaded = checkpoint.load_file(tmp_path / "file.pth")["lr"]
        assert type(loaded) is type(value)
        assert loaded == value


def void_with_objects() -> np.void:
    """Eight bytes that NumPy would take for the address of an object."""
    return np.zeros(1, dtype=[("a", "O")])[0]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.zeros(3), "numpy"),
        (np.array([Runs(len, "x")], dtype=object), "numpy"),
        (np.dtype("O"), "numpy.dtype"),
        (np.dtype([("a", "O")]), "numpy.dtype"),
        (void_with_objects(), "numpy.dtype"),
        (np.str_("text"), "numpy.dtype"),
        (np.complex128(1), "numpy.dtype"),
        (np.datetime64("2020-01-01"), "numpy.dtype"),
        (Path("/etc"), "pathlib"),
        (CfgNode({"MODEL": 1}), "yacs.config.CfgNode"),  # as Swin's training writes it
        (range(3), "range"),
        (builtins.getattr, "getattr"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_of_numpy_or_python_is_refused(tmp_path, value, named):
    for write in (zipped, legacy):
        (tmp_path / "file.pth").write_bytes(write({"x": value}))
        with pytest.raises(checkpoint.NotIntact, match=f"wants to run '{named}.* saved alone"):
            checkpoint.load_file(tmp_path / "file.pth")
