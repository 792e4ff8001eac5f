"""The measurements run, hold what benchmarks/README.md asks, and their figures fit together."""

import datetime
import importlib
import json
import os
import platform
import shlex
import statistics
import sys

import pytest
import torch
from PIL import Image

from tests.processes import run_python
from utils.errors import InputError

CROPS = "--batch 2 --global_size 32 --local_crops 2 --local_size 16 --threads 1"
NETWORK = "--arch vit_small --prototypes 64"
SMALL = """
    MODEL.EMBED_DIM 32 MODEL.DEPTHS [2] MODEL.NUM_HEADS [2] MODEL.PATCH_SIZE 8 MODEL.IMG_SIZE 32
    HEAD.HIDDEN_DIM 48 HEAD.BOTTLENECK_DIM 32 HEAD.POOL_HIDDEN 8
"""
GIB = 2**30


@pytest.fixture
def measured(tmp_path, environment):
    """A measurement's report, complete, and what it printed: measured(module, words)."""

    def measure(module: str, words: str) -> tuple[dict, str]:
        path = tmp_path / "report.json"
        words = f"--output {path} {CROPS} {words}".split()
        done = run_python("-m", f"benchmarks.{module}", *words, environment=environment)
        report = json.loads(path.read_text())
        assert datetime.date.fromisoformat(report["date"]) <= datetime.date.today()
        assert report["device"].endswith("1 threads, no GPU")
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        assert report["versions"] == versions
        (command,) = report["commands"]
        head = ["OMP_NUM_THREADS=1", "python", "-m", f"benchmarks.{module}"]
        assert shlex.split(command) == head + words
        assert report["seconds"] > 0
        assert "batch 2, 2 x 32 + 2 x 16 pixels" in report["what"]
        assert all(remark.endswith(".") for remark in report["remarks"])
        return report, done.stdout

    return measure


def test_step(measured):
    words = "--contestants fp32 fp32+CMD.LS=false --warm_up 1 --steps 2"
    report, said = measured("step", f"{words} {NETWORK} {SMALL}")
    found, without = report["figures"].values()
    assert without["gflop_per_image"] < found["gflop_per_image"]
    assert len(found["all_milliseconds"]) == 2
    assert found["milliseconds"] == statistics.median(found["all_milliseconds"])
    assert found["images_per_second"] == pytest.approx(2 / found["milliseconds"] * 1e3)
    flops_per_second = found["gflop_per_image"] * 1e9 * found["images_per_second"]
    assert found["share_of_ceiling"] == pytest.approx(
        flops_per_second / found["matmul_peak_tflops"] / 1e12
    )
    # Of the smallest product alone: student and teacher over the prototypes.
    assert found["gflop_per_image"] * 1e9 > 2 * 4 * 32 * 64
    assert 0.05 < found["peak_memory_gib"] < 4
    assert said.startswith("fp32: ")


def test_data(measured, images):
    words = f"--data_path {images} --workers 1 --turns 2 --batches 16 --cache_size 24"
    ways = ["workers", "decode", "shards", "ram"]
    report, said = measured("data", f"{words} --ways {' '.join(ways)}")
    figures = report["figures"]
    assert list(figures) == ways == [line.split(":")[0] for line in said.splitlines()]
    for way, found in figures.items():
        rates = found["all_images_per_second"]
        assert len(rates) == 2
        assert found["images_per_second"] == statistics.median(rates)
        assert found["loader_processes"] == 1
        # This process has one thread, and the loader's too.
        busy = found["core_milliseconds_per_image"] * found["images_per_second"] / 1e3
        assert busy < 2.5
        # Whoever makes the crops is counted, as is the loader's process.
        assert busy > 0.2
        assert ("kept_gib" in found) == (way == "ram")
    assert figures["ram"]["kept_gib"] == 16 * 24 * 24 * 3 / GIB
    assert figures["ram"]["fill_seconds"] > 0
    assert "cropped by the loader" in figures["workers"]["how"]
    assert figures["shards"]["how"] == figures["decode"]["how"] != figures["ram"]["how"]


def test_train_on_drawn_images(measured):
    words = "--images 6 --workers 0 --turns 3 --steps 2 --ways decode ram"
    report, said = measured("train", f"{words} {NETWORK} {SMALL}")
    figures = report["figures"]
    assert list(figures) == ["step alone", "decode", "ram"]
    alone = figures["step alone"]["images_per_second"]
    for way, found in figures.items():
        rates = found["all_images_per_second"]
        assert len(rates) == 3
        assert found["images_per_second"] == statistics.median(rates)
        assert f"{way}: {found['images_per_second']:.2f} images/s" in said
    for way in ("decode", "ram"):
        share = figures[way]["share_of_step_alone"]
        assert share == figures[way]["images_per_second"] / alone
    # A photograph's JPEG takes about as long to decode and crop as this network's step.
    assert figures["decode"]["share_of_step_alone"] < 0.9
    assert figures["ram"]["kept_gib"] == 6 * 375 * 500 * 3 / GIB
    assert "6 drawn JPEGs of 500 x 375 pixels" in report["what"]


def test_checkpoints(measured, tmp_path):
    report, said = measured("checkpoint", f"--folder {tmp_path} --turns 3 {NETWORK} {SMALL}")
    figures = report["figures"]
    assert list(figures) == ["none", "in the loop", "by a thread"]
    for name in ("in the loop", "by a thread"):
        found = figures[name]
        parts = (found[f"all_seconds_of_{part}"] for part in ("the_call", "steps_beyond"))
        taken = [sum(pair) for pair in zip(*parts, strict=True)]
        assert len(taken) == 3
        assert found["seconds_taken"] == pytest.approx(statistics.median(taken))
        minutes = max(0, found["seconds_taken"]) * 100 / 60
        assert found["minutes_between_for_1_percent"] == pytest.approx(minutes)
        assert 1e5 < found["gib"] * GIB < 1e7
        assert f"{name}: a checkpoint of {found['gib']:.2f} GiB takes" in said
    # The measurement leaves nothing behind.
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.slow
def test_scaling(measured, tmp_path):
    axes = "--batch_axis 2 --local_crops_axis --global_size_axis 32 36 --prototypes_axis 65536 64"
    report, said = measured("scaling", f"{axes} --steps 2 {NETWORK} {SMALL}")
    figures = report["figures"]
    assert figures["local_crops"] == []
    few, many = figures["prototypes"]
    assert (few["prototypes"], many["prototypes"]) == (64, 65536)
    for point in (few, many):
        assert point["milliseconds"] == statistics.median(point["all_milliseconds"])
        assert point["images_per_second"] == pytest.approx(2 / point["milliseconds"] * 1e3)
        matrix = 4 * point["prototypes"] * 32 / GIB
        # Two heads, seven matrices each.
        assert point["k_sized_gib"] == pytest.approx(14 * matrix)
        assert point["rest_gib"] == point["peak_memory_gib"] - point["k_sized_gib"]
    # Between steps, weights of student and teacher and two moments stay.
    growth = many["peak_memory_gib"] - few["peak_memory_gib"]
    assert growth > 2 * 4 * 4 * (65536 - 64) * 32 / GIB
    by_k = report["memory_by_prototypes"]
    assert (by_k["heads"], by_k["width"], len(by_k["k_sized_for_each_head"])) == (2, 32, 7)
    assert by_k["rest_differs_percent"] == pytest.approx(
        100 * (many["rest_gib"] - few["rest_gib"]) / few["rest_gib"]
    )
    assert by_k["k_sized_matrices"] == 14
    assert by_k["matrices_of_growth"] == pytest.approx(growth / (4 * (65536 - 64) * 32 / GIB))
    # The base setting lies on all axes and is measured once.
    (batch,), (size, uneven) = figures["batch"], figures["global_size"]
    assert batch["all_milliseconds"] == few["all_milliseconds"] == size["all_milliseconds"]
    # Patches of 8 pixels do not divide 36: that point fails and the others stand.
    assert (uneven["global_size"], uneven["local_size"], uneven["failed"]) == (36, 16, True)
    assert "global_size 36: failed" in said
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("module", "words", "told"),
    [
        ("step", "--contestants fp99", "there is no contestant 'fp99'"),
        ("step", "--contestants bf16+fast", "there is no contestant 'bf16.fast'"),
        ("step", "--reference NOWHERE", "--reference: NOWHERE holds no main_esvit.py"),
        ("train", "--contestant compile", "there is no contestant 'compile'"),
        ("train", "--contestant fp32 --data_path NOWHERE", "NOWHERE does not exist"),
        ("data", "--ways ram --data_path NOWHERE", "NOWHERE does not exist"),
        ("data", "--ways shards --data_path NOWHERE", "NOWHERE does not exist"),
        ("data", "--ways tape", "invalid choice: 'tape'"),
        ("data", "--batch 0", "--batch: must be a whole number from 1: 0"),
        ("data", "AUG.GRAY_PROB", "options come as KEY VALUE pairs, not AUG.GRAY_PROB"),
        ("scaling", "--contestant fp98", "there is no contestant 'fp98'"),
        ("scaling", "--batch_axis 0", "TRAIN.BATCH_SIZE_PER_GPU must be at least 1"),
        ("scaling", "HEAD.OUTDIM 64", "there is no option 'HEAD.OUTDIM'"),
    ],
)
def test_refusals(module, words, told, monkeypatch):
    network = "" if module == "data" else NETWORK
    pairs = SMALL if module == "step" else ""
    words = f"{module} {network} {words} {CROPS} {pairs}"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(InputError, match=told):
        importlib.import_module(f"benchmarks.{module}").main()
