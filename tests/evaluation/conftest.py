"""A small data set, a checkpoint, and what is made of both once for a file of tests."""

from pathlib import Path

import pytest
import torch

from tests.evaluation.runs import save_run, works, write_data
from tests.runs import copy_of


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A run of the objective cmd."""
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    save_run(path)
    return path


@pytest.fixture(scope="module")
def basic(data, weights) -> str:
    """The flags that every call needs; no pictures, which take the most time."""
    return f"--pretrained_weights {weights} --data_path {data} EVAL.PICTURES false"


@pytest.fixture(scope="module")
def knn_dump(basic, tmp_path_factory) -> Path:
    """A folder of kept features with the k-NN figures made of them. Tests only read it."""
    folder = tmp_path_factory.mktemp("dump") / "features"
    ks = "--nb_knn 1 3 9 500 --batch_size_per_gpu 4"
    out = works("knn", basic, f"--dump_features {folder}", ks)
    assert "from" not in out
    return folder


@pytest.fixture(scope="module")
def retrieval_alone(knn_dump, tmp_path_factory) -> Path:
    """Retrieval's figures by one process on the same features, and its picture."""
    folder = tmp_path_factory.mktemp("retrieval")
    works("retrieval", f"--load_features {knn_dump} --output_dir {folder} EVAL.PICTURES false")
    return folder


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory, data, weights) -> Path:
    """A folder of input that cannot be worked with, and of results that are there already."""
    folder = tmp_path_factory.mktemp("spoilt")
    own = torch.load(weights, weights_only=True)
    backbone = {k: v for k, v in own["student"].items() if k.startswith("backbone.")}
    torch.save({"student": backbone}, folder / "student.pth")
    torch.save({"teacher": {"stem.weight": torch.zeros(2)}}, folder / "unknown.pth")
    copy_of(data, folder / "bad")
    for n in range(4):
        (folder / "bad" / "train" / "class4" / f"{n}.jpg").write_text("no image")
    (folder / "file").write_text("a file")
    return folder
