"""Bad input of the evaluations: one sentence, exit code 2, earlier results untouched."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.evaluation import feature_cache
from export import export_backbone
from tests.disk import full_disk
from tests.evaluation.runs import contents, figures, refusal, results, works
from tests.processes import run_python
from tests.runs import copy_of
from utils import checkpoint

BAD = {
    "no checkpoint": ("--pretrained_weights IN/none.pth", "there is no checkpoint at IN/none.pth."),
    "no such key": (
        "--pretrained_weights IN/student.pth",
        "IN/student.pth has no 'teacher' weights; it has: student.",
    ),
    "a key of no network": (
        "--checkpoint_key tutor",
        "has no 'tutor' weights; it has: student, teacher.",
    ),
    "another arch, with what to do": (
        "--arch swin_tiny",
        "By itself the file shows vit_small: without --arch and MODEL.* options that is taken.",
    ),
    "unknown network": ("--pretrained_weights IN/unknown.pth", "none of the known backbones"),
    "no folder": ("--data_path IN/none", "the data folder IN/none does not exist"),
    "unreadable images": (
        "--data_path IN/bad",
        "images cannot be read, more than DATA.MAX_BAD 0.01 allows; for instance: the image "
        "IN/bad/train/class4/0.jpg cannot be read",
    ),
    "output below a file": (
        "--output_dir IN/file/below",
        "--output_dir IN/file/below cannot be written (Not a directory): choose another.",
    ),
    # Told before any image is read: extraction may take hours.
    "features below a file": (
        "--data_path IN/bad --dump_features IN/file/below",
        "--dump_features IN/file/below cannot be written",
    ),
    "no features": (
        "--load_features IN/bad",
        "there are no features at IN/bad/train.safetensors: its folder holds none.",
    ),
    "both features": (
        "--load_features IN/bad --dump_features IN/bad",
        "--load_features and --dump_features exclude each other",
    ),
    "size": (
        "--size 30",
        "EVAL.SIZE 30 is not a multiple of 8 pixels, the patch size of vit_small.",
    ),
    "resize": ("EVAL.RESIZE 16", "EVAL.RESIZE 16 is less than the centre crop of 32 pixels"),
    "precision": ("--precision fp16", "EVAL.PRECISION fp16 needs a GPU"),
    "pooling": ("--pooling max", "EVAL.POOLING must be one of default, mean, mil, lcr, not 'max'."),
    "partial": ("--dataset cub", "cub was not found in "),
}


@pytest.mark.parametrize(
    ("name", "case"), [*(("knn", case) for case in BAD), ("retrieval", "unreadable images")]
)
def test_bad_input_is_one_sentence_and_leaves_earlier_results(name, case, basic, spoilt, tmp_path):
    words, expected = BAD[case]
    for file in ("knn.json", "retrieval.json", "classes.png"):
        (tmp_path / file).write_text("earlier")
    before = contents(spoilt)
    line = refusal(name, basic, f"--output_dir {tmp_path}", words.replace("IN/", f"{spoilt}/"))
    assert expected.replace("IN/", f"{spoilt}/") in line
    assert contents(tmp_path) == dict.fromkeys(
        ("knn.json", "retrieval.json", "classes.png"), b"earlier"
    )
    assert contents(spoilt) == before


@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_what_must_be_given_is_asked_for(name, weights, data):
    assert refusal(name, f"--data_path {data}") == "no network: give --pretrained_weights."
    assert refusal(name, f"--pretrained_weights {weights}") == "no images: give --data_path."


@pytest.mark.parametrize(
    ("limit", "what"),
    [(100, "knn.json"), (25_000, "classes.png"), (100, "train.safetensors")],
)
def test_a_full_disk_is_one_sentence_and_leaves_earlier_files(
    limit, what, weights, data, knn_dump, tmp_path
):
    folder = copy_of(knn_dump, tmp_path / "out")
    (folder / "classes.png").write_text("earlier")
    words = f"--pretrained_weights {weights} --data_path {data} --dump_features {folder}"
    if what == "train.safetensors":
        words += " --checkpoint_key student"
    before = contents(folder)
    with full_disk(limit):
        line = refusal("knn", words)
    assert f"{folder}/{what} could not be written: " in line
    after = contents(folder)
    if what == "classes.png":
        assert after.pop("knn.json") != before.pop("knn.json"), "the figures came first"
    assert after == before


NOT_FINITE = "tensors (backbone.norm.weight): the run that made it has diverged"
OVERFLOWS = "infinite or undefined values"


@pytest.mark.parametrize("name", ["knn", "retrieval", "linear"])
@pytest.mark.parametrize(("weight", "words"), [(torch.nan, NOT_FINITE), (3e38, OVERFLOWS)])
def test_a_network_that_has_diverged_is_one_sentence(name, weight, words, weights, data, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["teacher"]["backbone.norm.weight"][3] = weight
    checkpoint.save(state, tmp_path / "nan.pth")
    line = f"--pretrained_weights {tmp_path}/nan.pth --data_path {data} --output_dir {tmp_path}/out"
    line += " --n_last_blocks 1" * (name == "linear")
    assert words in refusal(name, line)
    assert not any((tmp_path / "out").glob("*"))


INTO_A_CLOSED_PIPE = """
import os, runpy, sys
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
sys.stdout = open(1, "w", closefd=False)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_reader_that_has_seen_enough_stops_no_evaluation(basic, environment, tmp_path):
    words = ["eval_knn.py", *basic.split(), "--output_dir", tmp_path]
    words += ["--device", "cpu", "--num_workers", "0", "EVAL.PICTURES", "false"]
    done = run_python("-c", INTO_A_CLOSED_PIPE, *words, environment=environment)
    assert done.stderr == ""
    assert results(tmp_path, "knn")["k"]


def test_an_option_out_of_range_is_named_as_it_was_typed(basic):
    assert refusal("knn", basic, "--nb_knn 0").startswith("--nb_knn: KNN.KS must be at least 1")
    assert refusal("knn", basic, "KNN.KS 0").startswith("KNN.KS must be at least 1")


def test_an_export_is_evaluated_as_its_source(weights, data, tmp_path):
    """An export of ours says its image size and layout, which its shapes do not."""
    facts = export_backbone(weights, tmp_path / "out", "timm")
    assert facts["image_size"] == "32"
    found = []
    for name, file in (("source", weights), ("export", tmp_path / "out")):
        words = f"--pretrained_weights {file} --data_path {data} --output_dir {tmp_path}/{name}"
        works("knn", words, "EVAL.PICTURES false")
        found.append((figures(tmp_path / name, "knn"), results(tmp_path / name, "knn")))
    assert found[0][0] == found[1][0]
    sizes = [known["image_size"] for _, known in found]
    assert sizes[0] == sizes[1] == {"crop": 32, "resize": 37}


def test_a_mistyped_folder_of_features_is_not_made(tmp_path):
    assert "there are no features at" in refusal("knn", f"--load_features {tmp_path}/typo")
    assert os.listdir(tmp_path) == []


def test_features_are_the_labels_own(knn_dump, data):
    """Paths, labels and classes of a file belong together."""
    held = feature_cache.load(knn_dump / "test.safetensors")
    assert isinstance(held.values, Tensor)
    named = [held.classes[label] for label in held.labels.tolist()]
    assert named == [path.split("/")[0] for path in held.paths]
    assert all((Path(held.root) / path).is_file() for path in held.paths)
    assert held.root == f"{data}/val"
