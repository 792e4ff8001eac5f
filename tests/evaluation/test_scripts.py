"""eval_knn.py and eval_retrieval.py: as processes, their figures, results, edge cases."""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from engine.evaluation import feature_cache
from tests.datasets import benchmark_trees as trees
from tests.evaluation.runs import (
    CLASSES,
    TEST,
    TRAIN,
    figures,
    refusal,
    results,
    works,
    write_data,
)
from tests.processes import ROOT, free_port, run_group, run_python
from tests.runs import copy_of

ESVIT_YAML = """
MODEL: {EMBED_DIM: 48, DEPTHS: [2], NUM_HEADS: [3], PATCH_SIZE: 8, IMG_SIZE: 32}
EVAL: {SIZE: 32}
"""


# Processes


@pytest.fixture(scope="module")
def plain(environment, data, weights, tmp_path_factory) -> tuple[Path, CompletedProcess]:
    """k-NN as a plain process, with pictures, and with nothing said of where to write."""
    place = tmp_path_factory.mktemp("plain")
    copy = shutil.copy(weights, place / "checkpoint.pth")
    line = f"eval_knn.py --pretrained_weights {copy} --data_path {data} --nb_knn 3 --device cpu"
    done = run_python(*line.split(), environment=environment)
    return place / "eval_knn_checkpoint", done


def test_a_plain_process_writes_beside_its_checkpoint(plain):
    folder, done = plain
    assert sorted(os.listdir(folder)) == ["classes.png", "knn.json", "tsne.png"]
    assert done.stderr == ""
    top1, top5 = (results(folder, "knn")["k"]["3"][name] for name in ("top1", "top5"))
    assert f"3-NN: top-1 {top1:.2f} %, top-5 {top5:.2f} %" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == f"written: {folder}/knn.json, classes.png, tsne.png"


@pytest.mark.parametrize("name", ["classes.png", "tsne.png"])
def test_the_pictures_are_whole_and_show_something(plain, name):
    with Image.open(plain[0] / name) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 100
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_everything_behind_the_figures_is_written_down(plain, data, weights):
    folder, _ = plain
    known = results(folder, "knn")
    assert known["command"].startswith("python eval_knn.py --pretrained_weights ")
    assert known["command"].endswith(f"--data_path {data} --nb_knn 3 --device cpu")
    if (ROOT / ".git").exists():
        commit = known["commit"].removesuffix("+changes")
        kind = subprocess.run(
            ["git", "-C", ROOT, "cat-file", "-t", commit], capture_output=True, text=True
        )
        assert kind.stdout == "commit\n"
    else:
        assert known["commit"] is None
    assert known["versions"]["torch"] == torch.__version__
    assert known["versions"].keys() == {"python", "torch", "torchvision"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", known["date"])
    assert (known["processes"], known["device"].startswith("cpu (")) == (1, True)
    assert known["weights"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert known["weights"]["key"] == "teacher"
    assert known["weights"]["run_config"]["MODEL"]["EMBED_DIM"] == 48
    assert known["image_size"] == {"crop": 32, "resize": 37}
    assert known["config"]["KNN"]["KS"] == [3]
    assert known["data"] == {
        "name": "folder",
        "classes": CLASSES,
        "train": {"root": f"{data}/train", "images": CLASSES * TRAIN},
        "test": {"root": f"{data}/val", "images": CLASSES * TEST},
        "notes": [],
    }
    assert "unreadable_images" not in known


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_find_the_same_retrieval(
    processes, basic, retrieval_alone, environment, tmp_path
):
    line = f"{basic} --output_dir {tmp_path} --batch_size_per_gpu 4 --device cpu --num_workers 0"
    run_group(processes, "eval_retrieval.py", *line.split(), environment=environment)
    assert figures(tmp_path, "retrieval") == figures(retrieval_alone, "retrieval")
    assert results(tmp_path, "retrieval")["processes"] == processes


@pytest.mark.parametrize(
    "launched", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["group", "launcher"]
)
def test_esvits_command_runs_on_esvits_file(
    launched, data, weights, knn_dump, environment, tmp_path
):
    """With all of EsViT's flags, on a file in its form, as torch.distributed.launch starts it."""
    own = torch.load(weights, weights_only=True)
    states = {
        key: {f"module.{k}": v for k, v in own[key].items() if not k.startswith("pool.")}
        for key in ("student", "teacher")
    }
    torch.save({**states, "epoch": 1, "args": argparse.Namespace(arch="x")}, tmp_path / "e.pth")
    (tmp_path / "some.yaml").write_text(ESVIT_YAML)
    line = f"""
        eval_knn.py --data_path {data} --dump_features {tmp_path}/out/features
        --pretrained_weights {tmp_path}/e.pth --checkpoint_key teacher --batch_size_per_gpu 4
        --arch vit_small --patch_size 8 --cfg {tmp_path}/some.yaml --nb_knn 1 3 9 500
        --temperature 0.07 --use_cuda False --num_workers 1 --dist_url tcp://127.0.0.1:1
        --zip_mode MODEL.NUM_CLASSES 0 DEVICE cpu EVAL.PICTURES false
    """
    if launched:
        launcher = "-m torch.distributed.launch --nproc_per_node=2 --master_port"
        words = [*launcher.split(), free_port(), *line.split()]
        done = run_python(*words, environment=environment)
    else:
        script, *words = line.split()
        done = run_group(2, script, "--local-rank=0", *words, environment=environment)
    for flag in ("--use_cuda", "--dist_url", "--zip_mode"):
        assert done.stdout.count(f"warning: {flag} has no meaning here and is ignored: ") == 1
    # The same weights as in our own file, so the same figures and features.
    folder = tmp_path / "out" / "features"
    assert figures(folder, "knn") == figures(knn_dump, "knn")
    for split in ("train", "test"):
        ours, alone = (feature_cache.load(f / f"{split}.safetensors") for f in (folder, knn_dump))
        assert torch.equal(ours.values, alone.values)
        assert ours.paths == alone.paths
    found = results(folder, "knn")
    assert found["processes"] == 2
    assert done.stdout.count("written: ") == 1, "one process speaks"
    # Whatever else a foreign file holds, only our own runs have options.
    known = found["weights"]
    assert (known["run_config"], known["epoch"]) == (None, None)


# Figures


def kept(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit features, float64, and labels of a feature file."""
    held = feature_cache.load(folder / f"{split}.safetensors")
    values = held.values.double().numpy()
    return values / np.linalg.norm(values, axis=1, keepdims=True), held.labels.numpy()


@pytest.mark.parametrize("k", [1, 3, 9, 500])
def test_knn_figures_are_scikit_learns(knn_dump, k):
    (train, train_labels), (test, labels) = (kept(knn_dump, s) for s in ("train", "test"))
    assert (len(train), len(test)) == (CLASSES * TRAIN, CLASSES * TEST)
    found = results(knn_dump, "knn")["k"][str(k)]
    model = KNeighborsClassifier(
        min(k, len(train)), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    votes = model.fit(train, train_labels).predict_proba(test)
    ranked = np.argsort(-votes, axis=1, kind="stable")[:, :5]
    voted = np.take_along_axis(votes, ranked, axis=1) > 0
    correct = (ranked == labels[:, None]) & voted
    if k > len(train):
        # Where all images vote classes nearly tie: those within rounding may fall either way.
        own = votes[np.arange(len(labels)), labels]
        best = np.where(np.arange(votes.shape[1]) == labels[:, None], 0, votes).max(axis=1)
        least, most = (100 * (own > best * (1 + slack)).mean() for slack in (1e-5, -1e-5))
        assert least - 1e-6 <= found["top1"] <= most + 1e-6
    else:
        assert found["top1"] == pytest.approx(100 * correct[:, 0].mean())
    assert found["top5"] == pytest.approx(100 * correct.any(axis=1).mean())
    assert 5 < found["top1"] < 95, "the figure could be anything"
    assert (found["top5"] > found["top1"]) == (k > 1)


def test_figures_class_by_class_are_of_the_first_number_of_neighbours(knn_dump):
    known = results(knn_dump, "knn")
    by_class = known["classes"]["accuracy"]
    assert known["classes"]["k"] == 1
    assert list(by_class) == [f"class{n}" for n in range(CLASSES)]
    mean = sum(entry["accuracy"] * entry["images"] for entry in by_class.values()) / 28
    assert mean == pytest.approx(known["k"]["1"]["top1"])


def assert_retrieval(found: dict, gallery, gallery_labels, queries, labels) -> None:
    cosines = queries @ gallery.T
    precision = [
        average_precision_score(gallery_labels == label, row)
        for label, row in zip(labels, cosines, strict=True)
    ]
    hits = gallery_labels[np.argsort(-cosines, axis=1, kind="stable")] == labels[:, None]
    assert (found["gallery_images"], found["queries"]) == (len(gallery), len(queries))
    assert found["map"] == pytest.approx(100 * np.mean(precision), abs=1e-4)
    assert found["rank1"] == pytest.approx(100 * hits[:, 0].mean())
    assert found["rank5"] == pytest.approx(100 * hits[:, :5].any(axis=1).mean())
    assert 5 < found["map"] < 95


def test_retrieval_figures_are_scikit_learns(knn_dump, retrieval_alone):
    found = results(retrieval_alone, "retrieval")
    assert found["split"] == "standard"
    assert_retrieval(found, *kept(knn_dump, "train"), *kept(knn_dump, "test"))


def test_the_ratio_split_asks_with_every_ninth_test_image(knn_dump, tmp_path):
    words = f"--load_features {knn_dump} --output_dir {tmp_path} --split ratio"
    out = works("retrieval", words)
    found = results(tmp_path, "retrieval")
    assert "retrieval, split ratio: 4 queries, 59 images in the gallery" in out
    (train, train_labels), (test, labels) = (kept(knn_dump, s) for s in ("train", "test"))
    is_query = np.arange(len(test)) % 9 == 0
    gallery = np.concatenate([train, test[~is_query]])
    gallery_labels = np.concatenate([train_labels, labels[~is_query]])
    assert_retrieval(found, gallery, gallery_labels, test[is_query], labels[is_query])


@pytest.mark.parametrize("name", ["knn", "retrieval"])
@pytest.mark.parametrize("words", ["--checkpoint_key student", "--pooling mil", "--size 24"])
def test_other_features_give_other_figures(name, words, basic, knn_dump, retrieval_alone, tmp_path):
    ks = "--nb_knn 1 3 9 500" if name == "knn" else ""
    works(name, basic, f"--output_dir {tmp_path}", ks, words)
    former = knn_dump if name == "knn" else retrieval_alone
    found, other = results(tmp_path, name), results(former, name)
    assert any(found[key] != other[key] for key in ("k", "map") if key in found)
    assert found["gallery_images"] == other["gallery_images"]


def test_votes_follow_the_temperature(knn_dump, tmp_path):
    found = []
    for temperature in (0.02, 10):
        words = f"--load_features {knn_dump} --output_dir {tmp_path} --temperature {temperature}"
        works("knn", words, "--nb_knn 28 EVAL.PICTURES false")
        found.append(results(tmp_path, "knn"))
    assert [figure["temperature"] for figure in found] == [0.02, 10]
    assert found[0]["k"] != found[1]["k"]


# Where results go, and pictures


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "near/eval_NAME_checkpoint"),
        ("--output_dir OUT/deep/a", "deep/a"),
        ("--dump_features OUT/kept", "kept"),
        ("--dump_features OUT/kept --output_dir OUT/a", "a"),
        ("--load_features OUT/old", "old"),
        ("--load_features OUT/old --output_dir OUT/a", "a"),
    ],
)
@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_results_go_where_they_are_sent(name, words, expected, weights, data, knn_dump, tmp_path):
    (tmp_path / "near").mkdir()
    copy = shutil.copy(weights, tmp_path / "near" / "checkpoint.pth")
    copy_of(knn_dump, tmp_path / "old")
    (tmp_path / "old" / "knn.json").unlink()
    words = words.replace("OUT", str(tmp_path))
    works(name, f"--pretrained_weights {copy} --data_path {data} EVAL.PICTURES false", words)
    written = [str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("*.json")]
    assert written == [expected.replace("NAME", name)]
    assert not list(tmp_path.rglob("*.png"))


def has_hues(pixels: np.ndarray) -> bool:
    """Whether the red, green and blue of the images are seen in a picture."""
    strongest = pixels.astype(int).max(axis=2) - np.median(pixels, axis=2)
    strong = pixels[strongest > 100].argmax(axis=1)
    return all((strong == channel).sum() > 500 for channel in range(3))


def test_retrieval_of_kept_features_shows_images_that_have_moved(weights, data, tmp_path):
    """The files are the same under another root, which the fingerprint allows."""
    copy_of(data, tmp_path / "old")
    words = f"--pretrained_weights {weights} --dump_features {tmp_path}/kept"
    works("retrieval", words, f"--data_path {tmp_path}/old EVAL.PICTURES false")
    (tmp_path / "old").rename(tmp_path / "new")
    out = works("retrieval", words, f"--data_path {tmp_path}/new")
    assert "from" in out
    with Image.open(tmp_path / "kept" / "retrieval.png") as image:
        assert has_hues(np.asarray(image.convert("RGB")))


# Edge cases


@pytest.mark.parametrize(
    ("classes", "train", "test"),
    [
        (1, 3, 2),
        pytest.param(2, 3, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        (1, 1, 1),
    ],
)
@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_few_classes_and_few_images(name, classes, train, test, weights, tmp_path):
    data = write_data(tmp_path / "data", classes, train, test)
    line = f"--pretrained_weights {weights} --data_path {data} --output_dir {tmp_path}/out"
    works(name, line)
    found = results(tmp_path / "out", name)
    assert found["gallery_images"] == classes * train
    if name == "knn":
        assert found["test_images"] == classes * test
        assert found["k"].keys() == {"10", "20", "100", "200"}
        assert found["k"]["200"]["top5"] == 100
        assert found["k"]["200"]["neighbours"] == min(200, classes * train)
    else:
        assert found["queries"] == classes * test
        assert found["rank5"] >= found["rank1"]
    if classes == 1:
        top1 = found["k"]["10"]["top1"] if name == "knn" else found["map"]
        assert top1 == 100
    pictures = {"classes.png", "tsne.png"} if name == "knn" else {"retrieval.png"}
    if classes * test < 3:  # no map of so few
        pictures -= {"tsne.png"}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == pictures
    for picture in pictures:
        with Image.open(tmp_path / "out" / picture) as image:
            image.verify()


@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_a_part_of_a_benchmark(name, weights, tmp_path):
    trees.cub(tmp_path)
    line = f"--pretrained_weights {weights} --dataset cub --data_path {tmp_path}"
    line += f" --output_dir {tmp_path}/out"
    assert "cub in " in refusal(name, line)
    assert not (tmp_path / "out" / f"{name}.json").exists()
    out = works(name, line, "DATA.PARTIAL true EVAL.PICTURES false")
    known = results(tmp_path / "out", name)
    (note,) = known["data"]["notes"]
    found = f"cub in {tmp_path}/CUB_200_2011 has 3 classes, 9 training and 6 test images"
    assert note.startswith(found)
    assert f"warning: {note}" in out
    assert (known["data"]["name"], known["data"]["classes"]) == ("cub", 3)
    assert known["gallery_images"] == 9


def test_unreadable_images_within_the_share_are_told_listed_and_kept_so(weights, data, tmp_path):
    copy_of(data, tmp_path / "data")
    for name in ("train/class0/1.jpg", "train/class5/2.jpg", "val/class1/5.jpg"):
        (tmp_path / "data" / name).write_text("no image")
    line = f"--pretrained_weights {weights} --data_path {tmp_path}/data EVAL.PICTURES false"
    line += f" --dump_features {tmp_path}/kept DATA.MAX_BAD 0.1"
    for name in ("knn", "retrieval"):  # the second takes the features that the first kept
        out = works(name, line)
        assert "warning: left out of the train split, unreadable: 2 of " in out
        known = results(tmp_path / "kept", name)
        assert known["gallery_images"] == CLASSES * TRAIN - 2
        bad = known["unreadable_images"]
        assert [len(bad["train"]), len(bad["test"])] == [2, 1]
        assert f"{tmp_path}/data/train/class0/1.jpg cannot be read" in bad["train"][0]
    held = feature_cache.load(tmp_path / "kept" / "test.safetensors")
    assert "class1/5.jpg" not in held.paths
    assert len(held.paths) == len(held.labels) == CLASSES * TEST - 1


def test_queries_without_an_image_of_their_class_are_told(weights, data, tmp_path):
    """A class of which no training image can be read."""
    copy_of(data, tmp_path / "data")
    for path in (tmp_path / "data" / "train" / "class2").iterdir():
        path.write_text("no image")
    line = f"--pretrained_weights {weights} --data_path {tmp_path}/data EVAL.PICTURES false"
    out = works("retrieval", line, f"--output_dir {tmp_path} DATA.MAX_BAD 0.5")
    remarks = results(tmp_path, "retrieval")["remarks"]
    assert remarks == [
        "1 of 7 classes have no image in the train split",
        "4 of 28 queries have no image of their class in the gallery: they count as not found",
    ]
    assert all(f"warning: {remark}" in out for remark in remarks)
    out = works("knn", line, f"--output_dir {tmp_path} DATA.MAX_BAD 0.5 --nb_knn 3 30 40")
    found = results(tmp_path, "knn")
    assert found["remarks"] == remarks[:1]
    assert all(found["k"][k]["remarks"] == remarks[:1] for k in ("3", "30"))
    remark = "40-NN: the gallery has 30 images, and all of them vote"
    assert found["k"]["40"]["remarks"] == [remarks[0], remark]


@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_names_of_any_letters(name, weights, tmp_path):
    write_data(tmp_path / "data", 3, 3, 2)
    names = ["caf\udce9", "na$ï_ve^", "日本 owl"]  # the first is Latin-1, no UTF-8
    for number, label in enumerate(names):
        for split in ("train", "val"):
            folder = tmp_path / "data" / split
            (folder / f"class{number}").rename(folder / label)
    line = f"--pretrained_weights {weights} --data_path {tmp_path}/data"
    works(name, line, f"--dump_features {tmp_path}/out")
    again = f"--dump_features {tmp_path}/out EVAL.PICTURES false"
    assert "from" in works(name, line, again)
    held = feature_cache.load(tmp_path / "out" / "train.safetensors")
    assert held.classes == names
