"""Features kept on the disk: used again, refused where they do not fit."""

import os
import shutil

import pytest
import torch

from engine.evaluation import feature_cache, opening
from tests.datasets.photographs import edit
from tests.evaluation.runs import (
    CLASSES,
    TEST,
    TRAIN,
    contents,
    figures,
    refusal,
    results,
    works,
    write_data,
)
from tests.runs import copy_of
from utils import checkpoint, cli, distributed


def test_kept_features_are_used_again_with_the_same_figures(basic, knn_dump, tmp_path):
    folder = copy_of(knn_dump, tmp_path / "kept")
    before = contents(folder)
    out = works("knn", basic, f"--dump_features {folder} --nb_knn 1 3 9 500")
    for split in ("train", "test"):
        assert f"features of the {split} split: from {folder}/{split}.safetensors" in out
    assert figures(folder, "knn") == figures(knn_dump, "knn")
    after = contents(folder)
    assert all(after[name] == before[name] for name in before if name.endswith(".safetensors"))


@pytest.mark.parametrize("extra", ["", "--pretrained_weights", "--data_path"])
def test_kept_features_need_neither_checkpoint_nor_images(extra, weights, data, knn_dump, tmp_path):
    given = {"--pretrained_weights": weights, "--data_path": data, "": ""}[extra]
    words = f"--load_features {knn_dump} --output_dir {tmp_path} --nb_knn 1 3 9 500 {extra} {given}"
    works("knn", words)
    found, wanted = results(tmp_path, "knn"), results(knn_dump, "knn")
    assert (found["k"], found["classes"]) == (wanted["k"], wanted["classes"])
    assert ("weights" in found, "data" in found) == (
        extra == "--pretrained_weights",
        extra == "--data_path",
    )
    assert (tmp_path / "tsne.png").exists()
    made_by = [found["features"][split]["made_by"] for split in ("train", "test")]
    assert [each["weights"] for each in made_by] == [checkpoint.sha256(weights)] * 2
    assert found["features"]["test"]["images"] == CLASSES * TEST


@pytest.mark.parametrize(
    ("change", "words", "reason"),
    [
        ("", "--checkpoint_key student", "their checkpoint_key is teacher, not student"),
        ("", "--size 24", "their size is 32, not 24"),
        ("", "EVAL.RESIZE 40", "their resize is 37, not 40"),
        ("", "--precision bf16", "their precision is fp32, not bf16"),
        ("weights", "", "they come from another checkpoint (sha256 "),
        (
            "contents",
            "",
            "the images have changed since: their names, contents, number or labels",
        ),
        ("damage", "", "is not a feature file, or is damaged"),
    ],
)
def test_stale_features_are_made_again_or_refused(
    change, words, reason, weights, data, knn_dump, tmp_path
):
    folder = copy_of(knn_dump, tmp_path / "kept")
    path = folder / "train.safetensors"
    if change == "weights":
        state = torch.load(weights, weights_only=True)
        weights = tmp_path / "other.pth"
        checkpoint.save(state | {"step": 1}, weights)
    elif change == "damage":
        path.write_bytes(path.read_bytes()[:-9])
    elif change == "contents":
        data = copy_of(data, tmp_path / "data")
        edit(data / "train" / "class0" / "0.jpg")
    line = f"--pretrained_weights {weights} --data_path {data} --nb_knn 3 EVAL.PICTURES false"
    before = contents(folder)
    refused = refusal("knn", line, words, f"--load_features {folder}")
    assert refused.startswith(f"the features in {path} are refused: ")
    assert reason in refused
    assert contents(folder) == before
    out = works("knn", line, words, f"--dump_features {folder} --output_dir {tmp_path}/again")
    told = f"the features in {path} are made again: "
    assert reason in next(row for row in out.splitlines() if row.startswith(told))
    works("knn", line, words, f"--output_dir {tmp_path}/fresh")
    assert figures(tmp_path / "again", "knn") == figures(tmp_path / "fresh", "knn")
    assert "made again" not in works("knn", line, words, f"--dump_features {folder}")


def test_poolings_are_kept_beside_each_other(basic, knn_dump, tmp_path):
    folder = copy_of(knn_dump, tmp_path / "kept")
    before = contents(folder)
    out = works("knn", basic, f"--dump_features {folder} --pooling mil --output_dir {tmp_path}/mil")
    assert "made again" not in out
    assert {"train-mil.safetensors", "test-mil.safetensors"} < set(os.listdir(folder))
    assert all(contents(folder)[name] == value for name, value in before.items())
    load = f"--load_features {folder} --nb_knn 10 EVAL.PICTURES false"
    works("knn", load, f"--pooling mil --output_dir {tmp_path}/again")
    assert (
        results(tmp_path / "again", "knn")["k"]["10"]
        == (results(tmp_path / "mil", "knn")["k"]["10"])
    )
    missing = refusal("knn", load, "--pooling mean")
    assert f"there are no features at {folder}/train-mean.safetensors" in missing


def test_features_of_the_last_blocks_serve_knn_and_retrieval(
    basic, knn_dump, retrieval_alone, tmp_path
):
    """What the linear probe keeps, with the patches' mean, holds the image feature."""
    line = f"{basic} --dump_features {tmp_path} --num_workers 0 --device cpu"
    command = cli.parse("", line.split(), cli.KNN)
    opened = opening.open_features(command, distributed.start("cpu"))
    for split in ("train", "test"):
        assert opened.of(split, blocks=2, avgpool_patchtokens=True).widths == [48, 48, 48]
    before = contents(tmp_path)
    out = works("knn", line, f"--nb_knn 1 3 9 500 --output_dir {tmp_path}/out")
    assert out.count("from") == 2
    works("retrieval", line, f"--output_dir {tmp_path}/out")
    assert figures(tmp_path / "out", "knn") == figures(knn_dump, "knn")
    for name in ("rank1", "rank5", "map", "map_at_100_released"):
        wanted = results(retrieval_alone, "retrieval")[name]
        assert results(tmp_path / "out", "retrieval")[name] == wanted
    assert all(contents(tmp_path)[name] == value for name, value in before.items())
    # But what it lacks is made again.
    more = opened.encoder(2)
    assert torch.equal(
        opened.of("test", blocks=2).values,
        opened.reading.extract(more, opened.splits.test).values,
    )


def test_fewer_blocks_than_wanted_are_extracted_again(basic, knn_dump, tmp_path, capsys):
    folder = copy_of(knn_dump, tmp_path / "kept")
    command = cli.parse("", f"{basic} --dump_features {folder} --num_workers 0".split(), cli.KNN)
    opened = opening.open_features(command, opening.join(command))
    assert opened.of("train", blocks=2).values.shape == (CLASSES * TRAIN, 96)
    assert "made again: they hold the last 1 block" in capsys.readouterr().out
    assert feature_cache.load(folder / "train.safetensors").widths == [48, 48]


@pytest.mark.parametrize(
    ("words", "classes", "differ"),
    [("--checkpoint_key student", CLASSES, "checkpoint_key"), ("", 5, "classes")],
)
def test_features_of_two_networks_or_data_sets_are_not_compared(
    words, classes, differ, weights, knn_dump, tmp_path
):
    """A dump that was cut short leaves the one split of the one and the other of the other."""
    data, folder = tmp_path / "data", copy_of(knn_dump, tmp_path / "mixed")
    line = f"--pretrained_weights {weights} --data_path {data} EVAL.PICTURES false"
    write_data(data, classes)
    works("knn", line, words, f"--dump_features {tmp_path}/other")
    shutil.copy(tmp_path / "other" / "train.safetensors", folder)
    before = contents(folder)
    refused = refusal("knn", f"--load_features {folder} --nb_knn 3 EVAL.PICTURES false")
    assert f"do not belong together: train and test differ in {differ}. " in refused
    assert contents(folder) == before


def test_kept_features_are_held_to_the_share_of_unreadable_images(weights, spoilt, tmp_path):
    words = f"--pretrained_weights {weights} --data_path {spoilt}/bad EVAL.PICTURES false"
    words += f" --dump_features {tmp_path}/kept"
    works("knn", words, "DATA.MAX_BAD 0.5")
    assert "4 of 35 images cannot be read, more than DATA.MAX_BAD 0.1" in refusal(
        "knn", words, "DATA.MAX_BAD 0.1"
    )
