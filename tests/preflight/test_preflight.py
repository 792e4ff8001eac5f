"""--check: what it finds in a folder made for it, when it refuses, and how well it estimates."""

import json
import os
import re
import resource
import shutil
import sys
from itertools import repeat
from pathlib import Path

import pytest
import torch
from PIL import Image

import main_cmd
from datasets.folder import ImageFolder
from datasets.shards import ImageShards, write_shards
from engine import build
from engine.preflight import memory
from engine.preflight.inspection import equal_files, read_headers
from models import swin
from tests.conftest import NETWORK, save_images
from tests.processes import found_by_each, run_group
from tests.runs import batch_of, pretraining, small_config
from utils import checkpoint, cli, flags
from utils.distributed import ALONE
from utils.errors import InputError, run_script

GIB = 2**30


@pytest.fixture
def data(tmp_path) -> Path:
    """train: 10 red and 8 green images, of which one is empty, one tiny and one a copy; val: 3
    red ones, of which one is a training image."""
    train, val = tmp_path / "data" / "train", tmp_path / "data" / "val"
    save_images(train / "red", 10, 0)
    save_images(train / "green", 5, 1)
    (train / "green" / "empty.jpg").touch()
    Image.new("RGB", (40, 20)).save(train / "green" / "tiny.png")
    shutil.copy(train / "red" / "03.png", train / "green" / "copy.png")
    save_images(val / "red", 2, 3)
    shutil.copy(train / "green" / "01.png", val / "red" / "leak.png")
    return train


@pytest.fixture
def check(monkeypatch, capsys):
    """main_cmd.py --check in this process: check(options, code) -> (stdout, stderr)."""

    def run(options: str, code: int = 0) -> tuple[str, str]:
        words = [*NETWORK.split(), "TRAIN.BATCH_SIZE_PER_GPU", "4", *options.split()]
        monkeypatch.setattr(sys, "argv", ["main_cmd.py", "--check", *words])
        if code:
            with pytest.raises(SystemExit) as caught:
                run_script(main_cmd.main)
            assert caught.value.code == code
        else:
            run_script(main_cmd.main)
        return tuple(capsys.readouterr())

    return run


def found_in(folder: Path) -> dict:
    return json.loads((folder / "check.json").read_text())


def all_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_every_figure_in_words_and_as_data(data, check, tmp_path):
    before = all_files(data.parent)
    out = tmp_path / "out"
    told, errors = check(f"DATA.PATH {data} OUTPUT_DIR {out} DATA.MAX_BAD 0.1 TRAIN.EPOCHS 3")
    assert errors == ""
    assert all_files(out) == ["check.json"]
    assert all_files(data.parent) == before

    found = found_in(out)
    assert found["works"] is True
    assert found["problems"] == []
    assert found["images"] == {
        "path": str(data),
        "dataset": "folder",
        "count": 18,
        "unreadable": [{"path": f"{data}/green/empty.jpg", "reason": "the file is empty"}],
        "unreadable_share": 1 / 18,
        "max_bad": 0.1,
        "tiny": [{"path": f"{data}/green/tiny.png", "size": [40, 20]}],
        "tiny_below": 32,
        "duplicates": [[f"{data}/green/copy.png", f"{data}/red/03.png"]],
        "classes": {"green": 8, "red": 10},
    }
    val = data.parent / "val"
    assert found["validation"] == {
        "path": str(val),
        "source": "beside the training",
        "count": 3,
        "unreadable": [],
        "in_training": [{"validation": f"{val}/red/leak.png", "training": f"{data}/green/01.png"}],
    }
    assert found["batch"] == {
        "images_per_step": 4,
        "batch": 4,
        "processes": 1,
        "accumulation": 1,
        "steps_per_epoch": 4,
        "epochs": 3,
        "total_steps": 12,
        "left_over": 2,
        "peak_lr": 0.05 * 4 / 256,
    }
    assert found["crops"] == {
        "sizes": [32, 32, 16, 16],
        "made_on": "loader",
        "workers": 0,
        "processes": 1,
        "cache": "none",
    }
    lines = told.splitlines()
    assert f"images: 18 in {data}" in lines
    assert any(
        line.startswith("  unreadable: 1 (5.56%; DATA.MAX_BAD allows 10.00%). Only headers")
        for line in lines
    )
    assert f"    {data}/green/empty.jpg: the file is empty" in lines
    assert "  tiny (a side of less than 32 pixels): 1" in lines
    assert f"    {data}/green/tiny.png (40 x 20)" in lines
    assert f"    {data}/green/copy.png = {data}/red/03.png" in lines
    assert "  classes: 2, of 8 (green) to 10 (red) images (pretraining uses no labels)" in lines
    assert f"validation: 3 images in {val} (beside the training)" in lines
    assert f"    {val}/red/leak.png = {data}/green/01.png" in lines
    assert "batch: 4 images a step (batch 4 x processes 1 x accumulation 1)" in lines
    assert any(
        line.startswith("  4 steps an epoch, 12 in 3 epochs; 2 images left") for line in lines
    )
    warnings = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    assert warnings == found["warnings"]
    assert [warning.split(" ", 4)[:4] for warning in warnings] == [
        ["1", "of", "18", "images"],
        ["1", "training", "images", "have"],
        ["1", "training", "images", "are"],
        ["1", "of", "3", "validation"],
        ["CMD.LT", "residual", "compares", "a"],  # of a batch of 4
    ]
    assert lines[-1] == "the run can work (warnings above: 5)"


def test_without_an_output_folder_nothing_is_written(data, check, tmp_path, monkeypatch):
    before = all_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    told, _ = check(f"DATA.PATH {data}  DATA.MAX_BAD 0.1")
    assert all_files(tmp_path) == before
    assert "the run can work" in told
    assert "disk:" not in told


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("TRAIN.BATCH_SIZE_PER_GPU 19", "the data set has 18 images but one step takes 19"),
        ("DATA.MAX_BAD 0.05", "1 of 18 images cannot be read, more than DATA.MAX_BAD 0.05"),
        ("AUG.GLOBAL_CROPS_SIZE 33", "AUG.GLOBAL_CROPS_SIZE 33 is not a multiple of 8 pixels"),
        ("EVAL.KNN_EVERY 1 EVAL.KNN_TRAIN {0}/red EVAL.KNN_VAL {0}", "outside class subfolders"),
        ("INIT.WEIGHTS {0}/none.pth", "there is no checkpoint at"),
    ],
)
def test_what_cannot_work_is_one_error_after_the_report(data, check, tmp_path, options, sentence):
    out = tmp_path / "out"
    base = f"DATA.PATH {data} OUTPUT_DIR {out} DATA.MAX_BAD 0.1"
    told, errors = check(f"{base} {options.format(data)}", code=2)
    (line,) = errors.splitlines()
    assert line.startswith("error: the run cannot work: ")
    assert sentence in line
    found = found_in(out)
    assert found["works"] is False
    assert sentence in found["problems"][0]
    assert f"images: 18 in {data}" in told
    assert "the run can work" not in told
    assert all_files(out) == ["check.json"]


def test_all_problems_are_told_at_once(data, check, tmp_path):
    out = tmp_path / "out"
    told, errors = check(f"DATA.PATH {data} OUTPUT_DIR {out} TRAIN.BATCH_SIZE_PER_GPU 19", code=2)
    assert len(found_in(out)["problems"]) == told.count("would stop the run: ") == 2
    assert errors.count("\n") == 1
    assert "(and 1 more, above)" in errors


def test_a_step_of_a_large_share_of_the_data_is_warned_of(data, check):
    base = f"DATA.PATH {data} DATA.MAX_BAD 0.1"
    assert "a step takes 5 of 18 images" in check(f"{base} TRAIN.BATCH_SIZE_PER_GPU 5")[0]
    assert "a step takes" not in check(base)[0]


def test_a_folder_held_against_itself_is_no_leak(data, check, tmp_path):
    base = f"DATA.PATH {data} OUTPUT_DIR {tmp_path / 'out'} DATA.MAX_BAD 0.1"
    check(f"{base} EVAL.KNN_TRAIN {data} EVAL.KNN_VAL {data}/../train")
    assert found_in(tmp_path / "out")["validation"] is None
    check(f"{base} EVAL.KNN_TRAIN {data} EVAL.KNN_VAL {data.parent}/val")
    found = found_in(tmp_path / "out")["validation"]
    assert found["source"] == "EVAL.KNN_VAL"
    assert len(found["in_training"]) == 1


def test_training_on_train_and_val_together_is_warned_of(data, check):
    told, _ = check(f"DATA.PATH {data.parent} DATA.MAX_BAD 0.1")
    assert "holds the folders train, val and all of them are trained on" in told


def test_kept_images_are_counted_by_their_headers(data, check, tmp_path):
    options = f"DATA.PATH {data} OUTPUT_DIR {tmp_path / 'out'} DATA.MAX_BAD 0.1"
    told, _ = check(f"{options} DATA.CACHE ram DATA.CACHE_SIZE 24 AUG.LOCAL_CROPS_NUMBER [0]")
    found = found_in(tmp_path / "out")
    # 16 images of 48 x 48 pixels are reduced to 24 x 24; one is 40 x 20 already.
    assert found["memory"]["cache"] == 3 * (16 * 24 * 24 + 40 * 20)
    assert found["crops"]["made_on"] == "cpu"
    assert "made by the batch on cpu, of images kept decoded" in told


def test_files_of_one_length_are_compared_to_the_last_byte(tmp_path):
    """Raw pixels: all headers and lengths are equal; one differs in its first pixel alone."""
    pixels = torch.zeros(64, 64, 3, dtype=torch.uint8)
    other = pixels.clone()
    other[0, 0] = 1
    for name, values in {"a": pixels, "b": other, "c": pixels, "d": other + 1}.items():
        Image.fromarray(values.numpy()).save(tmp_path / f"{name}.ppm")
    images = ImageFolder(tmp_path)
    headers = read_headers(images, ALONE, workers=0)
    assert len(set(headers)) == 1
    assert equal_files([images], [headers], workers=0) == [[(0, 0), (0, 2)]]


def test_members_of_shards_are_compared_and_read(data, tmp_path):
    write_shards(data, tmp_path / "shards", images_per_shard=7)
    shards, folder = ImageShards(tmp_path / "shards"), ImageFolder(data)
    headers = [read_headers(images, ALONE, workers=0) for images in (shards, folder)]
    readable = [sorted(h for h in found if h.size is not None) for found in headers]
    assert len(readable[0]) == 17
    assert readable[0] == readable[1]
    groups = equal_files([shards, folder], headers, workers=0)
    assert sorted(len(group) for group in groups) == [2] * 15 + [4]
    for group in groups:
        assert {
            shards.source(index)[0].getvalue()
            if number == 0
            else folder.source(index)[0].read_bytes()
            for number, index in group
        } == {folder.source(group[-1][1])[0].read_bytes()}


def test_a_folder_to_go_on_in_is_told(data, check, tmp_path):
    out = tmp_path / "out"
    words = [*NETWORK.split(), "TRAIN.BATCH_SIZE_PER_GPU", "4"]
    cfg = cli.parse("", [*words, "OUTPUT_DIR", str(out), "DATA.PATH", str(data)]).cfg
    run = pretraining(cfg)
    run.step = 3
    out.mkdir()
    checkpoint.save_last(run.state(), out)
    size = (out / checkpoint.LAST).stat().st_size
    options = f"DATA.PATH {data} OUTPUT_DIR {out} DATA.MAX_BAD 0.1"
    told, _ = check(options)
    found = found_in(out)["disk"]
    assert found["resumes_at_step"] == 3
    assert found["kept_for_good"] == 5
    assert "it goes on from step 3" in told
    assert all_files(out) == ["check.json", checkpoint.LAST]
    _, errors = check(f"{options} HEAD.OUT_DIM 32", code=2)
    assert "is from a run with other options: HEAD.OUT_DIM (was 64, now 32)" in errors
    # Here the moments are missing, for no step was taken.
    assert found["checkpoint"] > size


def test_the_size_of_a_checkpoint(tmp_path):
    cfg = small_config(HEAD__OUT_DIM=4096)
    run = pretraining(cfg)
    run.train_step(repeat(drawn_batch(cfg)))
    checkpoint.save(run.state(), tmp_path / "a.pth")
    told = memory.of_step(cfg, ALONE, *build.networks(cfg)).checkpoint
    assert told == pytest.approx((tmp_path / "a.pth").stat().st_size, rel=0.05)


def drawn_batch(cfg):
    count = cfg.TRAIN.BATCH_SIZE_PER_GPU
    return batch_of([torch.randn(count, 3, size, size) for size in build.augmentation(cfg).sizes])


VIT = {
    "MODEL__EMBED_DIM": 192,
    "MODEL__DEPTHS": [4],
    "MODEL__IMG_SIZE": 96,
    "AUG__GLOBAL_CROPS_SIZE": 96,
    "AUG__LOCAL_CROPS_SIZE": 48,
    "AUG__LOCAL_CROPS_NUMBER": 4,
    "HEAD__OUT_DIM": 4096,
    "TRAIN__BATCH_SIZE_PER_GPU": 16,
}
SWIN = {
    "MODEL__ARCH": "swin_tiny",
    "MODEL__EMBED_DIM": 48,
    "MODEL__DEPTHS": [2, 2],
    "MODEL__NUM_HEADS": [2, 4],
    "MODEL__PATCH_SIZE": 4,
    "MODEL__IMG_SIZE": 112,
    "AUG__GLOBAL_CROPS_SIZE": 112,
    "AUG__LOCAL_CROPS_SIZE": 48,
    "AUG__LOCAL_CROPS_NUMBER": 4,
    "HEAD__OUT_DIM": 4096,
    "TRAIN__BATCH_SIZE_PER_GPU": 12,
}


def memory_of_two_steps(world, options: dict) -> int:
    """Bytes by which this process grew at most in two real steps."""
    take_steps(small_config(), 1)  # loads what torch loads at first use
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    take_steps(small_config(**options), 2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def take_steps(cfg, count: int) -> None:
    run, batches = pretraining(cfg), repeat(drawn_batch(cfg))
    for _ in range(count):
        run.train_step(batches)


@pytest.mark.parametrize("options", [VIT, SWIN], ids=["vit", "swin"])
def test_the_estimate_is_near_a_measured_peak(options):
    (measured,) = found_by_each(1, memory_of_two_steps, options)
    cfg = small_config(**options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = memory.of_step(cfg, ALONE, *build.networks(cfg))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert measured > 0.4 * GIB  # so that libraries are a small part of it
    assert found.peak == pytest.approx(measured, rel=0.3)
    assert grown < 0.3 * found.peak
    assert found.recomputed < 0.5 * found.activations


def estimate(**options) -> memory.StepMemory:
    cfg = small_config(LOSS__OBJECTIVE="dino", MODEL__DEPTHS=[6], HEAD__OUT_DIM=16, **options)
    return memory.of_step(cfg, ALONE, *build.networks(cfg))


def test_the_estimate_follows_batch_precision_and_checkpointing():
    plain, large = estimate(), estimate(TRAIN__BATCH_SIZE_PER_GPU=6)  # 3 by default
    assert large.activations == pytest.approx(2 * plain.activations, rel=0.05)
    half = estimate(TRAIN__BATCH_SIZE_PER_GPU=6, TRAIN__PRECISION="bf16")
    assert 0.5 < half.activations / large.activations < 0.8
    less = estimate(TRAIN__BATCH_SIZE_PER_GPU=6, TRAIN__CHECKPOINTING=True)
    assert less.activations == large.activations
    assert less.recomputed == large.recomputed < 0.5 * large.activations
    assert less.peak < 0.8 * large.peak


def test_an_objective_that_contrasts_is_estimated_by_its_own_crops_and_queue():
    """One crop of each image, in student and teacher; a queue where the centres were."""
    options = {"MODEL__ARCH": "swin_tiny", "MODEL__DEPTHS": [2, 2], "MODEL__NUM_HEADS": [1, 2]}
    options |= {"MODEL__EMBED_DIM": 32, "MODEL__PATCH_SIZE": 4, "AUG__LOCAL_CROPS_NUMBER": []}
    found = {}
    for objective in ("dino", "moco_v2", "lcr"):
        cfg = small_config(**options, LOSS__OBJECTIVE=objective, MOCO__QUEUE=1000)
        found[objective] = memory.of_step(cfg, ALONE, *build.networks(cfg))
    queue, place = 4 * 1000 * 32, 8  # float32 keys, an int64
    assert found["moco_v2"].carried == found["lcr"].carried == queue + place
    assert found["dino"].carried == 4 * 64
    assert found["moco_v2"].activations == pytest.approx(found["dino"].activations / 2, rel=0.1)
    assert found["moco_v2"].activations < found["lcr"].activations  # the branch's


def test_a_backbone_that_cannot_recompute():
    cfg = small_config(
        MODEL__ARCH="resnet50",
        MODEL__EMBED_DIM=0,
        MODEL__DEPTHS=[],
        MODEL__NUM_HEADS=[],
        MODEL__PATCH_SIZE=0,
    )
    found = memory.of_step(cfg, ALONE, *build.networks(cfg))
    assert found.recomputed is None
    assert found.activations > found.crops


def test_an_estimate_leaves_no_trace_in_what_follows():
    """Swin keeps masks between calls; the estimate's have no data."""
    cfg = small_config(**SWIN | {"TRAIN__BATCH_SIZE_PER_GPU": 2})
    crops = drawn_batch(cfg).data
    student, _ = build.networks(cfg)
    with torch.no_grad():
        before = student.eval()(crops).image_embeddings
    kept = dict(swin._masks)
    assert kept
    memory.of_step(cfg, ALONE, *build.networks(cfg))
    assert swin._masks == kept
    with torch.no_grad():
        assert torch.equal(student(crops).image_embeddings, before)


def test_the_flag_is_pretrainings_alone_and_takes_no_value():
    assert cli.parse("", ["--check"]).check
    assert not cli.parse("", []).check
    assert cli.parse("", ["--check", "SEED", "3"]).cfg.SEED == 3
    with pytest.raises(InputError, match=r"TRAIN\.EPOCH\b"):
        cli.parse("", ["--check", "TRAIN.EPOCH", "3"])
    with pytest.raises(InputError, match="--check"):
        cli.parse("", ["--check=yes"])
    with pytest.raises(InputError, match="unknown argument '--check'"):
        cli.parse("", ["--check"], flags.KNN)


def test_two_processes_speak_once(data, tmp_path, environment):
    out = tmp_path / "out"
    words = f"{NETWORK} DATA.PATH {data} OUTPUT_DIR {out} DATA.MAX_BAD 0.1 LOSS.OBJECTIVE cmd"
    done = run_group(2, "main_cmd.py", "--check", *words.split(), environment=environment)
    assert len(re.findall(r"^images: 18 in ", done.stdout, flags=re.M)) == 1
    assert "16 images a step (batch 8 x processes 2 x accumulation 1)" in done.stdout
    assert done.stdout.count("the run can work") == 1
    found = found_in(out)
    assert found["batch"]["images_per_step"] == 16
    assert found["memory"]["processes_here"] == 2
    assert len(found["images"]["unreadable"]) == 1
    assert os.listdir(out) == ["check.json"]
