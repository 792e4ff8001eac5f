"""eval_knn.py and eval_retrieval.py: as processes, their figures, kept features, refusals."""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import eval_knn
import eval_linear
import eval_retrieval
from engine import evaluation, feature_cache
from export import export_backbone
from tests import benchmark_trees as trees
from tests.processes import run_python
from tests.runs import pretraining, small_config
from utils import checkpoint, cli, distributed, flags
from utils.errors import run_script

ROOT = Path(__file__).parents[1]
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
ESVIT_YAML = """
MODEL: {EMBED_DIM: 48, DEPTHS: [2], NUM_HEADS: [3], PATCH_SIZE: 8, IMG_SIZE: 32}
EVAL: {SIZE: 32}
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A run of the objective cmd whose student and teacher differ, and with a spread attention."""
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    run = pretraining(small_config())
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*run.student.parameters(), *run.teacher.parameters()]:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    checkpoint.save(run.state(), path)
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


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


# Processes; three for k-NN and two for retrieval are slow, extraction by both is in test_features


@pytest.fixture(scope="module")
def plain(environment, data, weights, tmp_path_factory) -> tuple[Path, Done]:
    """k-NN as a plain process, with pictures, and with nothing said of where to write."""
    place = tmp_path_factory.mktemp("plain")
    copy = shutil.copy(weights, place / "checkpoint.pth")
    line = f"eval_knn.py --pretrained_weights {copy} --data_path {data} --nb_knn 3 --device cpu"
    return place / "eval_knn_checkpoint", process(environment, *line.split())


def test_a_plain_process_writes_beside_its_checkpoint(plain, weights):
    folder, done = plain
    assert sorted(os.listdir(folder)) == ["classes.png", "knn.json", "tsne.png"]
    assert done.err == ""
    top1, top5 = (results(folder, "knn")["k"]["3"][name] for name in ("top1", "top5"))
    assert f"3-NN: top-1 {top1:.2f} %, top-5 {top5:.2f} %" in done.out.splitlines()
    assert done.out.splitlines()[-1] == f"written: {folder}/knn.json, classes.png, tsne.png"


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
    assert known["weights"]["sha256"] == checkpoint_hash(weights)
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


def checkpoint_hash(path: Path) -> str:
    done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


@pytest.mark.slow
def test_torchrun_with_three_processes_finds_the_same_knn(basic, knn_dump, environment, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=3", f"--master_port={free_port()}"]
    line = f"{basic} --nb_knn 1 3 9 500 --batch_size_per_gpu 4 --device cpu --num_workers 0"
    words = f"{line} --dump_features {tmp_path} --output_dir {tmp_path}/out".split()
    done = process(environment, *launcher, "eval_knn.py", *words)
    assert figures(tmp_path / "out", "knn") == figures(knn_dump, "knn")
    assert results(tmp_path / "out", "knn")["processes"] == 3
    assert done.out.count("written: ") == 1, "one process speaks"
    for split in ("train", "test"):
        ours, alone = (
            feature_cache.load(folder / f"{split}.safetensors") for folder in (tmp_path, knn_dump)
        )
        assert torch.equal(ours.values, alone.values)
        assert ours.paths == alone.paths


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_torchrun_finds_the_same_retrieval(
    processes, basic, retrieval_alone, environment, tmp_path
):
    port = f"--master_port={free_port()}"
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", port]
    line = f"{basic} --output_dir {tmp_path} --batch_size_per_gpu 4 --device cpu --num_workers 0"
    process(environment, *launcher, "eval_retrieval.py", *line.split())
    assert figures(tmp_path, "retrieval") == figures(retrieval_alone, "retrieval")
    assert results(tmp_path, "retrieval")["processes"] == processes


def test_esvits_command_runs_on_esvits_file(data, weights, knn_dump, environment, tmp_path):
    """torch.distributed.launch with all of EsViT's flags, on a file in its form."""
    own = torch.load(weights, weights_only=True)
    states = {
        key: {f"module.{k}": v for k, v in own[key].items() if not k.startswith("pool.")}
        for key in ("student", "teacher")
    }
    torch.save({**states, "epoch": 1, "args": argparse.Namespace(arch="x")}, tmp_path / "e.pth")
    (tmp_path / "some.yaml").write_text(ESVIT_YAML)
    launcher = [
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ]
    line = f"""
        eval_knn.py --data_path {data} --dump_features {tmp_path}/out/features
        --pretrained_weights {tmp_path}/e.pth --checkpoint_key teacher --batch_size_per_gpu 4
        --arch vit_small --patch_size 8 --cfg {tmp_path}/some.yaml --nb_knn 1 3 9 500
        --temperature 0.07 --use_cuda False --num_workers 1 --dist_url tcp://127.0.0.1:1
        --zip_mode MODEL.NUM_CLASSES 0 DEVICE cpu EVAL.PICTURES false
    """
    done = process(environment, *launcher, *line.split())
    for flag in ("--use_cuda", "--dist_url", "--zip_mode"):
        assert done.out.count(f"warning: {flag} has no meaning here and is ignored: ") == 1
    # The same weights as in our own file, so the same figures.
    assert figures(tmp_path / "out" / "features", "knn") == figures(knn_dump, "knn")


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
    correct = ranked == labels[:, None]
    assert found["top1"] == pytest.approx(100 * correct[:, 0].mean())
    assert found["top5"] == pytest.approx(100 * correct.any(axis=1).mean())
    assert 5 < found["top1"] < 95, "the figure could be anything"
    assert found["top5"] > found["top1"]


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


def test_retrieval_shows_its_images(weights, data, tmp_path):
    works("retrieval", f"--pretrained_weights {weights} --data_path {data} --output_dir {tmp_path}")
    assert sorted(os.listdir(tmp_path)) == ["retrieval.json", "retrieval.png"]
    with Image.open(tmp_path / "retrieval.png") as image:
        assert image.format == "PNG"
        assert has_hues(np.asarray(image.convert("RGB")))


def has_hues(pixels: np.ndarray) -> bool:
    """Whether the red, green and blue of the images are seen in a picture."""
    strongest = pixels.astype(int).max(axis=2) - np.median(pixels, axis=2)
    strong = pixels[strongest > 100].argmax(axis=1)
    return all((strong == channel).sum() > 500 for channel in range(3))


def test_retrieval_of_kept_features_shows_images_that_have_moved(weights, data, knn_dump, tmp_path):
    """The files are the same under another root, which the fingerprint allows."""
    copy_of(data, tmp_path / "old")
    words = f"--pretrained_weights {weights} --dump_features {tmp_path}/kept"
    works("retrieval", words, f"--data_path {tmp_path}/old EVAL.PICTURES false")
    (tmp_path / "old").rename(tmp_path / "new")
    out = works("retrieval", words, f"--data_path {tmp_path}/new")
    assert "from" in out
    with Image.open(tmp_path / "kept" / "retrieval.png") as image:
        assert has_hues(np.asarray(image.convert("RGB")))


# Kept features


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


def changed_data(data: Path, to: Path, change: str) -> Path:
    copy_of(data, to)
    one = to / "train" / "class0" / "0.jpg"
    if change == "size":
        one.write_bytes(one.read_bytes() + b"x")
    elif change == "more":
        shutil.copy(one, to / "train" / "class6" / "z.jpg")
    else:
        one.rename(to / "train" / "class1" / "z.jpg")
    return to


IMAGES_CHANGED = "the images have changed since: their names, sizes, number or labels"


@pytest.mark.parametrize(
    ("change", "words", "reason"),
    [
        ("", "--checkpoint_key student", "their checkpoint_key is teacher, not student"),
        ("", "--size 24", "their size is 32, not 24"),
        ("", "EVAL.RESIZE 40", "their resize is 37, not 40"),
        ("", "--precision bf16", "their precision is fp32, not bf16"),
        ("weights", "", "they come from another checkpoint (sha256 "),
        ("size", "", IMAGES_CHANGED),
        ("more", "", IMAGES_CHANGED),
        ("label", "", IMAGES_CHANGED),
        ("damage", "", "is not a feature file, or is damaged"),
        ("foreign", "", "holds no features that this version wrote"),
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
    elif change == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif change:
        data = changed_data(data, tmp_path / "data", change)
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
    basic, data, weights, knn_dump, retrieval_alone, tmp_path
):
    """What the linear probe keeps, with the patches' mean, holds the image feature."""
    line = f"{basic} --dump_features {tmp_path} --num_workers 0 --device cpu"
    command = cli.parse("", line.split(), flags.KNN)
    opened = evaluation.open_evaluation(command, distributed.start("cpu"))
    for split in ("train", "test"):
        assert opened.features(split, blocks=2, avgpool_patchtokens=True).widths == [48, 48, 48]
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
    more = opened.source.encoder(command.cfg, 2)
    assert torch.equal(
        opened.features("test", blocks=2).values, opened.extract(more, opened.splits.test).values
    )


def test_fewer_blocks_than_wanted_are_extracted_again(basic, knn_dump, tmp_path, capsys):
    folder = copy_of(knn_dump, tmp_path / "kept")
    command = cli.parse("", f"{basic} --dump_features {folder} --num_workers 0".split(), flags.KNN)
    opened = evaluation.open_evaluation(command, evaluation.join(command))
    assert opened.features("train", blocks=2).values.shape == (CLASSES * TRAIN, 96)
    assert "made again: they hold the last 1 block" in capsys.readouterr().out
    assert feature_cache.load(folder / "train.safetensors").widths == [48, 48]


def test_features_of_two_networks_are_not_compared(basic, knn_dump, tmp_path):
    """A dump that was cut short leaves the one split of the one and the other of the other."""
    works("knn", basic, f"--checkpoint_key student --dump_features {tmp_path}/student")
    folder = copy_of(knn_dump, tmp_path / "mixed")
    shutil.copy(tmp_path / "student" / "train.safetensors", folder)
    before = contents(folder)
    refusal("knn", f"--load_features {folder} --nb_knn 3 EVAL.PICTURES false")
    assert contents(folder) == before


def test_features_of_two_data_sets_are_not_compared(weights, knn_dump, tmp_path):
    """As a dump leaves them that failed between the splits."""
    words = f"--pretrained_weights {weights} --data_path {tmp_path}/data EVAL.PICTURES false"
    write_data(tmp_path / "data", classes=5)
    works("knn", words, f"--dump_features {tmp_path}/five")
    folder = copy_of(knn_dump, tmp_path / "mixed")
    shutil.copy(tmp_path / "five" / "train.safetensors", folder)
    line = refusal("knn", f"--load_features {folder} --nb_knn 3 EVAL.PICTURES false")
    assert "do not belong together" in line
    assert "classes" in line


def test_kept_features_are_held_to_the_share_of_unreadable_images(weights, spoilt, tmp_path):
    words = f"--pretrained_weights {weights} --data_path {spoilt}/bad EVAL.PICTURES false"
    words += f" --dump_features {tmp_path}/kept"
    works("knn", words, "EVAL.MAX_BAD 0.5")
    assert "4 of 35 images cannot be read, more than EVAL.MAX_BAD 0.1" in refusal(
        "knn", words, "EVAL.MAX_BAD 0.1"
    )


def test_figures_of_kept_features_say_what_made_them(knn_dump, weights, tmp_path):
    words = f"--load_features {knn_dump} --output_dir {tmp_path} EVAL.PICTURES false"
    works("knn", words)
    known = results(tmp_path, "knn")["features"]
    sha256 = checkpoint.sha256(weights)
    assert [known[split]["made_by"]["weights"] for split in ("train", "test")] == [sha256] * 2
    assert known["test"]["images"] == CLASSES * TEST


# Edge cases


@pytest.mark.parametrize(("classes", "train", "test"), [(1, 3, 2), (2, 3, 2), (2, 1, 1), (1, 1, 1)])
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
def test_one_test_image_of_several_classes(name, weights, data, tmp_path):
    copy_of(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val")
    trees.save_image(tmp_path / "data" / "val" / "class3" / "x.jpg", 0, 0)
    line = f"--pretrained_weights {weights} --data_path {tmp_path}/data --output_dir {tmp_path}"
    out = works(name, line, "--split ratio" if name == "retrieval" else "")
    assert f"{tmp_path}/data/val has no images of 6 of the 7 classes: class0, " in out
    found = results(tmp_path, name)
    assert found["gallery_images"] == CLASSES * TRAIN
    if name == "knn":
        assert found["classes"]["accuracy"].keys() == {"class3"}
        assert found["k"]["10"]["top1"] in (0, 100)
    else:
        assert (found["queries"], found["queries_without_positives"]) == (1, 0)


def test_train_and_test_folders(weights, tmp_path):
    trees.folders(tmp_path, second="test")
    works("knn", f"--pretrained_weights {weights} --data_path {tmp_path} EVAL.PICTURES false")
    folder = weights.parent / f"eval_knn_{weights.stem}"
    assert results(folder, "knn")["data"]["test"] == {"root": f"{tmp_path}/test", "images": 6}


@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_a_part_of_a_benchmark(name, weights, tmp_path):
    trees.cub(tmp_path)
    line = f"--pretrained_weights {weights} --dataset cub --data_path {tmp_path}"
    line += f" --output_dir {tmp_path}/out"
    assert "cub in " in refusal(name, line)
    assert not (tmp_path / "out" / f"{name}.json").exists()
    out = works(name, line, "DATA.PARTIAL true")
    known = results(tmp_path / "out", name)
    (note,) = known["data"]["notes"]
    assert note.startswith(f"cub in {tmp_path} has 3 classes, the official data set has 200")
    assert f"warning: {note}" in out
    assert (known["data"]["name"], known["data"]["classes"]) == ("cub", 3)
    assert known["gallery_images"] == 9


def test_unreadable_images_within_the_share_are_told_listed_and_kept_so(weights, data, tmp_path):
    copy_of(data, tmp_path / "data")
    for name in ("train/class0/1.jpg", "train/class5/2.jpg", "val/class1/5.jpg"):
        (tmp_path / "data" / name).write_text("no image")
    line = f"--pretrained_weights {weights} --data_path {tmp_path}/data EVAL.PICTURES false"
    line += f" --dump_features {tmp_path}/kept EVAL.MAX_BAD 0.1"
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
    out = works("retrieval", line, f"--output_dir {tmp_path} EVAL.MAX_BAD 0.5")
    assert "warning: 4 queries have no image of their class in the gallery" in out
    assert results(tmp_path, "retrieval")["queries_without_positives"] == 4


@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_names_of_any_letters(name, weights, tmp_path):
    write_data(tmp_path / "data", 2, 3, 2)
    for number, label in enumerate(["日本 owl", "na$ï_ve^"]):
        for split in ("train", "val"):
            folder = tmp_path / "data" / split
            (folder / f"class{number}").rename(folder / label)
    line = f"--pretrained_weights {weights} --data_path {tmp_path}/data"
    works(name, line, f"--dump_features {tmp_path}/out")
    works(name, line, f"--load_features {tmp_path}/out")
    held = feature_cache.load(tmp_path / "out" / "train.safetensors")
    assert held.classes == ["na$ï_ve^", "日本 owl"]


@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_class_names_that_are_not_utf_8(name, weights, tmp_path):
    write_data(tmp_path / "data", 2, 3, 2)
    for split in ("train", "val"):
        folder = tmp_path / "data" / split
        (folder / "class0").rename(folder / os.fsdecode(b"caf\xe9"))
    line = f"--pretrained_weights {weights} --data_path {tmp_path}/data"
    works(name, line, f"--dump_features {tmp_path}/out")
    assert "from" in works(name, line, f"--dump_features {tmp_path}/out")


# Bad input


def test_a_refusal_of_a_process_is_one_line_and_code_2(environment, data, tmp_path):
    line = f"eval_retrieval.py --pretrained_weights {tmp_path}/no.pth --data_path {data}"
    done = process(environment, *line.split(), "--output_dir", tmp_path, code=2)
    assert done.err == f"error: there is no checkpoint at {tmp_path}/no.pth.\n"
    assert done.out == ""
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory, data, weights) -> Path:
    """A folder of input that cannot be worked with, and of results that are there already."""
    folder = tmp_path_factory.mktemp("spoilt")
    own = torch.load(weights, weights_only=True)
    backbone = {k: v for k, v in own["student"].items() if k.startswith("backbone.")}
    torch.save({"student": backbone}, folder / "student.pth")
    torch.save({"teacher": {"stem.weight": torch.zeros(2)}}, folder / "unknown.pth")
    copy_of(data, folder / "no_val")
    shutil.rmtree(folder / "no_val" / "val")
    copy_of(data, folder / "stray")
    trees.save_image(folder / "stray" / "val" / "x.jpg", 0, 0)
    copy_of(data, folder / "classes")
    (folder / "classes" / "train" / "class3").rename(folder / "classes" / "train" / "class9")
    copy_of(data, folder / "bad")
    for n in range(4):
        (folder / "bad" / "train" / "class4" / f"{n}.jpg").write_text("no image")
    (folder / "file").write_text("a file")
    return folder


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
    "another arch": ("--arch swin_tiny", "the weights do not fit the network. missing: "),
    "another arch, with what to do": (
        "--arch swin_tiny",
        "By itself the file shows vit_small: without --arch and MODEL.* options that is taken.",
    ),
    "another width": (
        "--arch vit_base",
        "cls_token is [1, 1, 48] in the file, [1, 1, 768] here",
    ),
    "unknown network": ("--pretrained_weights IN/unknown.pth", "none of the known backbones"),
    "no folder": ("--data_path IN/none", "the data folder IN/none does not exist"),
    "no split": ("--data_path IN/no_val", "IN/no_val has no val or test folder"),
    "outside classes": ("--data_path IN/stray", "IN/stray/val has images outside class subfolders"),
    "unknown classes": (
        "--data_path IN/classes",
        "IN/classes/val has classes that IN/classes/train lacks: class3",
    ),
    "unreadable images": (
        "--data_path IN/bad",
        "images cannot be read, more than EVAL.MAX_BAD 0.01 allows; for instance: the image "
        "IN/bad/train/class4/0.jpg cannot be read",
    ),
    "output below a file": (
        "--output_dir IN/file/below",
        "--output_dir IN/file/below cannot be written (Not a directory): choose another.",
    ),
    "features below a file": ("--dump_features IN/file/below", "--dump_features IN/file/below"),
    "no features": (
        "--load_features IN/stray",
        "there are no features at IN/stray/train.safetensors: IN/stray holds none.",
    ),
    "both features": (
        "--load_features IN/stray --dump_features IN/stray",
        "--load_features and --dump_features exclude each other",
    ),
    "unknown flag": ("--nb_knnn 3 --spllit x", "unknown argument '--"),
    "size": ("--size 30", "EVAL.SIZE 30 is not a multiple of 8 pixels"),
    "resize": ("EVAL.RESIZE 16", "EVAL.RESIZE 16 is less than the centre crop of 32 pixels"),
    "precision": ("--precision fp16", "EVAL.PRECISION fp16 needs a GPU"),
    "pooling": ("--pooling max", "EVAL.POOLING must be one of default, mean, mil, not 'max'."),
    "partial": ("--dataset cub", "cub was not found in "),
    "unknown data set": ("--dataset birds", "there is no data set 'birds'"),
}


@pytest.mark.parametrize("name", ["knn", "retrieval"])
@pytest.mark.parametrize("case", BAD)
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


@pytest.mark.parametrize("words", ["--nb_knn", "--nb_knn 0", "--nb_knn 1.5", "--temperature 0"])
def test_bad_figures_are_one_sentence(words, basic):
    assert refusal("knn", basic, words)


@contextlib.contextmanager
def full_disk(limit: int):
    """No file may grow beyond `limit` bytes, as on a disk with no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


@pytest.mark.parametrize("name", ["knn", "retrieval", "linear"])
def test_a_network_that_has_diverged_is_one_sentence(name, weights, data, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["teacher"]["backbone.norm.weight"][3] = torch.nan
    checkpoint.save(state, tmp_path / "nan.pth")
    line = f"--pretrained_weights {tmp_path}/nan.pth --data_path {data} --output_dir {tmp_path}/out"
    line += " --n_last_blocks 1" * (name == "linear")
    assert "infinite or undefined values" in refusal(name, line)
    assert os.listdir(tmp_path / "out") == []


def test_a_reader_that_has_seen_enough_stops_no_evaluation(basic, environment, tmp_path):
    command = [sys.executable, "eval_knn.py", *basic.split(), "--output_dir", str(tmp_path)]
    command += ["--device", "cpu", "--num_workers", "0", "EVAL.PICTURES", "false"]
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    started.stdout.close()
    errors = started.stderr.read()
    assert (started.wait(timeout=120), errors) == (0, b"")
    assert results(tmp_path, "knn")["k"]


def test_an_option_out_of_range_is_named_as_it_was_typed(basic):
    assert refusal("knn", basic, "--nb_knn 0").startswith("--nb_knn: KNN.KS must be at least 1")
    assert refusal("knn", basic, "KNN.KS 0").startswith("KNN.KS must be at least 1")


def test_an_export_is_evaluated_as_its_source(weights, data, tmp_path):
    """An export of ours says its image size and layout, which its shapes do not."""
    facts = export_backbone(weights, tmp_path / "out.safetensors", "timm")
    assert facts["image_size"] == "32"
    found = []
    for name, file in (("source", weights), ("export", tmp_path / "out.safetensors")):
        words = f"--pretrained_weights {file} --data_path {data} --output_dir {tmp_path}/{name}"
        works("knn", words, "EVAL.PICTURES false")
        found.append((figures(tmp_path / name, "knn"), results(tmp_path / name, "knn")))
    assert found[0][0] == found[1][0]
    sizes = [known["image_size"] for _, known in found]
    assert sizes[0] == sizes[1] == {"crop": 32, "resize": 37}


def test_a_folder_for_features_that_cannot_be_is_told_before_the_work(basic, spoilt, tmp_path):
    """Before any image is read: extraction may take hours."""
    words = f"--data_path {spoilt}/bad --output_dir {tmp_path}"
    line = refusal("knn", basic, words, f"--dump_features {spoilt}/file/below")
    assert f"--dump_features {spoilt}/file/below cannot be written" in line


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
