"""Pointing and its zeros on known maps; report.py on real runs; the demo as a whole (slow)."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import report
from datasets import synthetic
from datasets.folder import load_image
from datasets.multicrop import eval_transform
from datasets.synthetic_images import DIFFICULTIES
from engine import build
from engine.evaluation import pointing
from engine.evaluation.source import load_source
from tests.conftest import refusal_of
from tests.processes import run_python
from tests.runs import cfg_of

ROOT = Path(__file__).parents[2]


def test_cells_touch_a_box_where_they_overlap_it():
    # A grid of 2 x 4 cells of 16 pixels.
    boxes = [(0, 0, 16, 16), (0, 0, 17, 17), (63, 31, 64, 32), (20, 10, 40, 15)]
    touching = pointing.cells_touching(boxes, (2, 4), 16).int().tolist()
    assert touching == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
        [0, 1, 1, 0, 0, 0, 0, 0],
    ]


def test_pointing_and_its_zeros_on_known_maps():
    touching = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]).bool()
    attention = torch.tensor(
        [[0.1, 0.6, 0.2, 0.1], [0.2, 0.3, 0.3, 0.2], [0.0, 0.0, 0.0, 1.0], [0.7, 0.1, 0.1, 0.1]]
    )
    assert pointing.figures(attention, touching) == {
        "accuracy": 75,  # misses the second
        "chance": pytest.approx(100 * 5 / 16),
        "best_fixed_cell": 75,  # the first cell
        "mass_on_part": pytest.approx(100 * (0.7 + 0.2 + 1 + 0.7) / 4),
    }
    even = pointing.figures(torch.full((4, 4), 0.25), touching)
    assert even["accuracy"] == even["chance"] == even["mass_on_part"]


def test_a_report_of_a_run_on_plain_folders(trained, images, environment, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("checkpoint.pth", "log.txt"):
        (folder / name).symlink_to(trained / name)
    arguments = ("--output_dir", folder, "--gallery", images, "--queries", images, "--k", 3)
    done = run_python("report.py", *arguments, environment=environment)
    results = json.loads((folder / "results.json").read_text())
    # Queries are the gallery: each image is its own nearest neighbour, and votes most.
    assert results["knn"]["trained"]["top1"] > 50
    assert "pointing" not in results  # nobody knows the parts
    (note,) = results["data"]["notes"]
    assert note.startswith("gallery and queries are the same folder")
    assert note in done.stdout
    # What stands behind the figures: the features that they are of.
    assert {split: of["images"] for split, of in results["features"].items()} == {
        "train": 16,
        "test": 16,
    }
    assert f"{results['knn']['random_initialisation']['top1']:.2f}" in done.stdout
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in re.sub(r"base64,[^']*", "", page)  # self-contained
    for name in ("loss_curves.png", "attention.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100


def test_a_report_of_images_without_labels_has_attention_and_no_knn(
    trained, images, environment, tmp_path
):
    folder, flat = tmp_path / "run", tmp_path / "flat"
    folder.mkdir()
    flat.mkdir()
    for name in ("checkpoint.pth", "log.txt"):
        (folder / name).symlink_to(trained / name)
    for path in images.rglob("*.png"):
        (flat / f"{path.parent.name}{path.name}").symlink_to(path)
    run_python("report.py", "--output_dir", folder, "--queries", flat, environment=environment)
    results = json.loads((folder / "results.json").read_text())
    assert "knn" not in results
    assert results["facts"]["optimizer steps"] == 8
    assert (folder / "attention.png").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--k 0", "--k: must be a whole number from 1: 0"),
        ("--size -8", "--size: must be a whole number from 1"),
        ("--num_workers -1", "--num_workers: must be a whole number from 0"),
        ("", "--gallery alone gives no figure: --queries names what is classified"),
    ],
)
def test_a_report_refuses_bad_figures(flags, words, trained, images, called):
    queries = f"--queries {images} {flags}" if flags else ""
    arguments = f"--output_dir {trained} --gallery {images} {queries}"
    assert words in refusal_of(called(report, *arguments.split()))


def test_boxes_reach_the_report_and_its_random_network_is_the_one_the_run_began_with(
    environment, tmp_path, pretrain
):
    """A run whose learning rate is 0 ends where it began."""
    config = DIFFICULTIES["easy"]
    synthetic.write_folder(config, 0, tmp_path / "data", train=20, val=30)
    data, folder = tmp_path / "data", tmp_path / "run"
    still = "TRAIN.EPOCHS 1 TRAIN.BASE_LR 0 TRAIN.MIN_LR 0 SEED 3"
    pretrain(folder, f"DATA.PATH {data}/train {still}")
    arguments = ("--gallery", data / "train", "--queries", data / "val", "--size", 64, "--k", 3)
    run_python("report.py", "--output_dir", folder, *arguments, environment=environment)
    results = json.loads((folder / "results.json").read_text())
    knn, figures = results["knn"], results["pointing"]
    assert knn["trained"] == knn["random_initialisation"]
    boxes = synthetic.read_parts(data)
    touching = pointing.cells_touching(
        [box for path, box in boxes.items() if path.startswith("val/")], (8, 8), 8
    )
    share = touching.double()
    assert figures["chance"] == pytest.approx(100 * share.mean().item())
    assert figures["best_fixed_cell"] == pytest.approx(100 * share.mean(0).max().item())


def test_a_report_of_lcr_shows_the_branchs_map_and_its_pointing(environment, tmp_path, pretrain):
    synthetic.write_folder(DIFFICULTIES["easy"], 0, tmp_path / "data", train=16, val=10)
    data, folder = tmp_path / "data", tmp_path / "run"
    swin = """MODEL.ARCH swin_tiny MODEL.EMBED_DIM 16 MODEL.DEPTHS [1,1] MODEL.NUM_HEADS [2,2]
        MODEL.PATCH_SIZE 4 MODEL.WINDOW_SIZE 4 AUG.LOCAL_CROPS_NUMBER []
        LOSS.OBJECTIVE lcr MOCO.QUEUE 32"""
    pretrain(folder, f"{swin} DATA.PATH {data}/train TRAIN.EPOCHS 1 SEED 3")
    arguments = ("--output_dir", folder, "--queries", data / "val", "--size", 64)
    done = run_python("report.py", *arguments, environment=environment)
    assert "Pointing of the LCR map at the part" in done.stdout
    figures = json.loads((folder / "results.json").read_text())["pointing"]

    teacher = load_source(folder / "checkpoint.pth").network
    boxes = {k: v for k, v in synthetic.read_parts(data).items() if k.startswith("val/")}
    touching = pointing.cells_touching(list(boxes.values()), (8, 8), 8)
    look = eval_transform(64, 64)
    images = torch.stack([look(load_image(data / path)) for path in boxes])
    accuracies = []
    for branch in (teacher.rationale, build.networks(cfg_of(folder))[0].eval().rationale):
        with torch.no_grad():
            predicted = branch(teacher.backbone(images)[1])
        accuracies.append(pointing.figures(predicted, touching)["accuracy"])
    assert [figures["accuracy"], figures["untrained_branch"]] == pytest.approx(accuracies)
    assert figures["chance"] == pytest.approx(100 * touching.double().mean().item())
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == 2


@pytest.mark.slow
def test_the_demo_learns(environment, tmp_path):
    """The Makefile's three commands, elsewhere: +10 points of k-NN over random initialisation."""
    recipe = re.search(r"^demo: env\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    recipe = recipe.replace("\\\n", " ").replace("$(DEMO)", str(tmp_path))
    lines = [line.split("$(BIN)/python", 1)[1] for line in recipe.splitlines() if "$(BIN)" in line]
    assert len(lines) == 3
    for line in lines:
        run_python(*shlex.split(line), environment=environment)
    results = json.loads((tmp_path / "results.json").read_text())
    gain = results["knn"]["trained"]["top1"] - results["knn"]["random_initialisation"]["top1"]
    assert gain >= 10
    assert results["pointing"]["accuracy"] > results["pointing"]["chance"]
    assert results["pointing"]["accuracy"] > results["pointing"]["untrained_pooling"]
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["teacher_information"] > 0.5  # targets still tell images apart
