"""--check: what it finds in a folder made for it, when it refuses, and how well it estimates."""

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_cmd
from datasets.folder import BadImage, ImageFolder
from datasets.shards import ImageShards, write_shards
from engine import build
from engine.preflight import advice, machine, memory
from engine.preflight.images import equal_files, read_headers
from tests.conftest import NETWORK, save_images
from tests.datasets import benchmark_trees as trees
from tests.processes import found_by_each, run_group
from tests.runs import RESNET, batch_of, checkpoint_of, pretraining, small_config
from utils import checkpoint, cli, precision
from utils.distributed import ALONE
from utils.errors import InputError

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
    for name in ("red/list.txt", "red/notes.txt", "README"):
        (train / name).touch()
    shutil.copy(train / "red" / "03.png", train / "green" / "copy.png")
    save_images(val / "red", 2, 3)
    shutil.copy(train / "green" / "01.png", val / "red" / "leak.png")
    return train


@pytest.fixture
def check(called):
    """main_cmd.py --check in this process: check(options, code) -> (stdout, stderr)."""

    def run(options: str, code: int = 0) -> tuple[str, str]:
        words = [*NETWORK.split(), "TRAIN.BATCH_SIZE_PER_GPU", "4", *options.split()]
        done = called(main_cmd, "--check", *words)
        assert done.code == code, done.err
        return done.out, done.err

    return run


def found_in(folder: Path) -> dict:
    return json.loads((folder / "check.json").read_text())


def all_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_every_figure_in_words_and_as_data(data, check, tmp_path):
    before = all_files(data.parent)
    out = tmp_path / "out"
    printed, errors = check(f"DATA.PATH {data} OUTPUT_DIR {out} DATA.MAX_BAD 0.1 TRAIN.EPOCHS 3")
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
        "passed_over": {".txt": 2, "none": 1},
        "unreadable": {f"{data}/green/empty.jpg": "the file is empty"},
        "max_bad": 0.1,
        "sides_below_32": {f"{data}/green/tiny.png": "40 x 20"},
        "equal_files": [[f"{data}/green/copy.png", f"{data}/red/03.png"]],
        "classes": {"green": 8, "red": 10},
    }
    val = data.parent / "val"
    assert found["validation"] == {
        "path": str(val),
        "count": 3,
        "unreadable": {},
        "also_in_training": [[f"{val}/red/leak.png", f"{data}/green/01.png"]],
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
        "crops": "2 x 32 + 2 x 16",
        "made_on": "loader",
        "workers": 0,
        "processes": 1,
        "cache": "none",
    }
    memory, disk = found["memory"], found["disk"]
    assert memory["step_at_its_peak_bytes"] < memory["needed_on_this_machine_bytes"]
    # The last one, the one before and the one that is being written; three epochs keep none.
    assert disk["checkpoint_bytes"] == memory["checkpoint_bytes"]
    assert disk["needed_bytes"] == 3 * disk["checkpoint_bytes"]
    lines = printed.splitlines()
    for line in (
        "images",
        "  count: 18",
        "  unreadable: 1",
        f"    {data}/green/empty.jpg: the file is empty",
        "  sides below 32: 1",
        f"    {data}/green/tiny.png: 40 x 20",
        f"    {data}/green/copy.png = {data}/red/03.png",
        "  classes: 2",
        "    green: 8",
        "validation",
        f"    {val}/red/leak.png = {data}/green/01.png",
        "  images per step: 4",
        "  left over: 2",
        f"  checkpoint: {disk['checkpoint_bytes'] / 2**20:.1f} MiB",
    ):
        assert line in lines
    warnings = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    assert warnings == found["warnings"]
    assert [warning.split(" ", 4)[:4] for warning in warnings] == [
        ["1", "of", "18", "images"],
        ["training", "images", "with", "a"],
        ["training", "images", "that", "are"],
        ["1", "of", "3", "validation"],
    ]
    assert lines[-1] == "the run can work (warnings above: 4)"


def test_each_process_of_a_machine_needs_its_own_step_and_batches(
    data, check, tmp_path, monkeypatch
):
    def needed(processes: int) -> dict:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        check(f"DATA.PATH {data} OUTPUT_DIR {tmp_path} DATA.MAX_BAD 0.1 DATA.WORKERS 1")
        return found_in(tmp_path)["memory"]

    one, three = needed(1), needed(3)
    assert three["processes_here"] == 3
    assert one["batches_in_the_loader_bytes"] == 2 * one["crops_bytes"] // 4  # not floats yet
    process = GIB + one["batches_in_the_loader_bytes"] + one["step_at_its_peak_bytes"]
    of = "needed_on_this_machine_bytes"
    assert one[of] == process + one["checkpoint_bytes"]
    assert three[of] == 3 * process + one["checkpoint_bytes"]


def test_without_an_output_folder_nothing_is_written(data, check, tmp_path, monkeypatch):
    before = all_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    printed, _ = check(f"DATA.PATH {data}  DATA.MAX_BAD 0.1")
    assert all_files(tmp_path) == before
    assert "the run can work" in printed
    assert "\ndisk\n" not in printed


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
    printed, errors = check(f"{base} {options.format(data)}", code=2)
    (line,) = errors.splitlines()
    assert line.startswith("error: the run cannot work: ")
    assert sentence in line
    found = found_in(out)
    assert found["works"] is False
    assert sentence in found["problems"][0]
    assert "  count: 18" in printed
    assert "the run can work" not in printed
    assert all_files(out) == ["check.json"]


def test_all_problems_are_named_at_once(data, check, tmp_path):
    out = tmp_path / "out"
    printed, errors = check(
        f"DATA.PATH {data} OUTPUT_DIR {out} TRAIN.BATCH_SIZE_PER_GPU 19", code=2
    )
    assert len(found_in(out)["problems"]) == printed.count("would stop the run: ") == 2
    assert errors.count("\n") == 1
    assert "(and 1 more, above)" in errors


def test_a_window_for_a_network_that_is_none_of_our_swins_is_said(data):
    def said(**options) -> bool:
        found = advice.warnings(small_config(**options), 1, ImageFolder(data))
        return any("MODEL.WINDOW_SIZE 14 is not used" in line for line in found)

    of_swin = SWIN | {"MODEL__WINDOW_SIZE": 14, "MODEL__IMG_SIZE": 64}
    own = {"MODEL__ARCH": "timm/test_vit2", "MODEL__IMG_SIZE": 32}
    assert [said(**of_swin), said(MODEL__WINDOW_SIZE=14), said()] == [False, True, False]
    assert said(**RESNET | own | {"MODEL__WINDOW_SIZE": 14})


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_on_a_cpu_without_it_is_said(data, monkeypatch, has):
    assert isinstance(precision.cpu_has_bfloat16(), bool)
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has)

    def said(wanted: str) -> bool:
        cfg = small_config(TRAIN__PRECISION=wanted, DEVICE="cpu")
        return any("no instructions" in line for line in advice.warnings(cfg, 1, ImageFolder(data)))

    assert [said("bf16"), said("fp32"), said("auto")] == [not has, False, False]


def test_a_micro_batch_of_one_image_is_no_comparison(data):
    def said(processes: int, **options) -> bool:
        cfg = small_config(TRAIN__ACCUM_STEPS=4, **options)
        found = advice.warnings(cfg, processes, ImageFolder(data))
        return any("compare the images of a micro-batch" in line for line in found)

    one = {"TRAIN__BATCH_SIZE_PER_GPU": 1}
    assert [said(1, **one), said(2, **one)] == [True, False]
    assert not said(1, LOSS__OBJECTIVE="esvit", **one)
    assert not said(1, TRAIN__BATCH_SIZE_PER_GPU=2)


def test_a_step_of_a_large_share_of_the_data_is_warned_of(data, check):
    base = f"DATA.PATH {data} DATA.MAX_BAD 0.1"
    assert "a step takes 5 of 18 images" in check(f"{base} TRAIN.BATCH_SIZE_PER_GPU 5")[0]
    assert "a step takes" not in check(base)[0]


def test_grey_of_more_than_eight_bits_is_counted(data, check):
    for n, kind in enumerate((np.uint16, np.int32, np.float32)):
        Image.fromarray(np.full((40, 40), n, dtype=kind)).save(data / "red" / f"deep{n}.tif")
    printed, _ = check(f"DATA.PATH {data} DATA.MAX_BAD 0.1")
    assert "grey images of more than 8 bits or of floating point: 3 of 20 that were" in printed


def test_pretraining_on_a_benchmark_needs_no_test_images(check, tmp_path):
    shutil.rmtree(trees.cars(tmp_path) / "cars_test")
    printed, _ = check(f"DATA.DATASET CARS DATA.PATH {tmp_path} DATA.PARTIAL true")
    assert "the test images are not looked at: cars was not found in" in printed
    assert "cars_test, or else car_ims, cars_annos.mat is missing" in printed


def test_an_output_among_the_images_would_stop_the_run(data, check):
    _, errors = check(f"DATA.PATH {data} DATA.MAX_BAD 0.1 OUTPUT_DIR {data}/red/run", code=2)
    assert f"{data}/red/run lies in {data}, the folder of images" in errors
    assert not (data / "red" / "run").exists()


def test_a_folder_held_against_itself_is_no_leak(data, check, tmp_path):
    base = f"DATA.PATH {data} OUTPUT_DIR {tmp_path / 'out'} DATA.MAX_BAD 0.1"
    check(f"{base} EVAL.KNN_TRAIN {data} EVAL.KNN_VAL {data}/../train")
    assert found_in(tmp_path / "out")["validation"] is None
    check(f"{base} EVAL.KNN_TRAIN {data} EVAL.KNN_VAL {data.parent}/val")
    found = found_in(tmp_path / "out")["validation"]
    assert len(found["also_in_training"]) == 1


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["train/red", "val/red"], ["train", "val"]),
        (["train", "test"], ["test", "train"]),  # images without classes
        (["Training/red", "Validation/red"], ["Training", "Validation"]),
        (["train2017", "val2017", "test2017"], ["test2017", "train2017", "val2017"]),
        (["train/red", "train/val"], []),  # a class of that name
        (["steam train", "test tube"], []),
        (["val/red", "test/red"], []),
    ],
)
def test_splits_in_one_folder_are_found(folders, names, tmp_path):
    for folder in folders:
        save_images(tmp_path / folder, 1, 0)
    assert advice.mixed_splits(ImageFolder(tmp_path)) == names


def test_shards_of_two_splits_in_one_folder_are_found(data, tmp_path):
    write_shards(data, tmp_path / "a", images_per_shard=9)
    for place, shard in enumerate(sorted((tmp_path / "a").glob("*.tar"))):
        shard.rename(tmp_path / "a" / f"birds-{('train', 'val')[place]}-000000.tar")
    assert advice.mixed_splits(ImageShards(tmp_path / "a")) == ["train", "val"]
    alone = ImageShards(tmp_path / "a/birds-train-{000000..000000}.tar")
    assert advice.mixed_splits(alone) == []


def test_a_run_warns_of_all_that_a_check_finds_at_no_cost(data, check, pretrain, tmp_path):
    """All but what lies in the images' headers."""
    options = f"DATA.PATH {data.parent} DATA.MAX_BAD 0.1 TRAIN.BATCH_SIZE_PER_GPU 6 TRAIN.EPOCHS 1"
    options += f" EVAL.KNN_EVERY 1 EVAL.KNN_TRAIN {data} EVAL.KNN_VAL {data.parent}/val"
    check(f"{options} OUTPUT_DIR {tmp_path}/out")
    of_headers = ("cannot be read", "with a side of less", "byte for byte")
    wanted = [
        warning
        for warning in found_in(tmp_path / "out")["warnings"]
        if not any(words in warning for words in of_headers)
    ]
    for words in ("holds train and val, and", "val is trained on", "a step takes 6 of 21 images"):
        assert any(words in warning for warning in wanted)
    printed = pretrain(tmp_path / "run", options).stdout.splitlines()
    assert set(wanted) <= {line.removeprefix("warning: ") for line in printed}


def test_kept_images_are_counted_by_their_headers(data, check, tmp_path):
    options = f"DATA.PATH {data} OUTPUT_DIR {tmp_path / 'out'} DATA.MAX_BAD 0.1"
    check(f"{options} DATA.CACHE ram DATA.CACHE_SIZE 24 AUG.LOCAL_CROPS_NUMBER [0]")
    found = found_in(tmp_path / "out")
    # 16 images of 48 x 48 pixels are reduced to 24 x 24; one is 40 x 20 already.
    assert found["memory"]["decoded_images_bytes"] == 3 * (16 * 24 * 24 + 40 * 20)
    assert found["crops"]["made_on"] == "cpu"


def test_files_of_one_length_are_compared_to_the_last_byte(tmp_path):
    """Raw pixels: lengths and sides are equal; one differs in its first pixel alone."""
    pixels = torch.zeros(64, 64, 3, dtype=torch.uint8)
    other = pixels.clone()
    other[0, 0] = 1
    for name, values in {"a": pixels, "b": other, "c": pixels}.items():
        Image.fromarray(values.numpy()).save(tmp_path / f"{name}.ppm")
    images = ImageFolder(tmp_path)
    headers = read_headers(images, ALONE, workers=0)
    assert headers == [(64, 64)] * 3
    assert equal_files([images], [headers]) == [[(0, 0), (0, 2)]]


def test_headers_of_shards_are_those_of_the_folder(data, tmp_path):
    write_shards(data, tmp_path / "shards", images_per_shard=7)
    shards, folder = ImageShards(tmp_path / "shards"), ImageFolder(data)
    headers = [read_headers(images, ALONE, workers=0) for images in (shards, folder)]
    readable = [sorted(s for s in found if not isinstance(s, BadImage)) for found in headers]
    assert len(readable[0]) == 17
    assert readable[0] == readable[1]
    assert len(equal_files([shards, folder], headers)) == 1  # the copy in the folder


def test_a_folder_to_go_on_in_is_found(data, check, tmp_path):
    out = tmp_path / "out"
    words = [*NETWORK.split(), "TRAIN.BATCH_SIZE_PER_GPU", "4"]
    cfg = cli.parse("", [*words, "OUTPUT_DIR", str(out), "DATA.PATH", str(data)]).cfg
    run = pretraining(cfg)
    run.step = 3
    out.mkdir()
    state = checkpoint_of(run) | {"images": ImageFolder(data).fingerprint}
    checkpoint.save_last(state, out)
    size = (out / checkpoint.LAST).stat().st_size
    options = f"DATA.PATH {data} OUTPUT_DIR {out} DATA.MAX_BAD 0.1"
    printed, _ = check(options)
    found = found_in(out)["disk"]
    assert found["goes_on_from_step"] == 3
    assert found["checkpoints_kept_for_good"] == 5
    assert "  goes on from step: 3" in printed
    assert all_files(out) == ["check.json", checkpoint.LAST]
    _, errors = check(f"{options} HEAD.OUT_DIM 32", code=2)
    assert "is from a run with other options: HEAD.OUT_DIM (was 64, now 32)" in errors
    # Here the moments are missing, for no step was taken.
    assert found["checkpoint_bytes"] > size


def test_the_size_of_a_checkpoint(tmp_path):
    cfg = small_config(HEAD__OUT_DIM=4096)
    run = pretraining(cfg)
    run.train_step(repeat(drawn_batch(cfg)))
    checkpoint.save(run.state(), tmp_path / "a.pth")
    estimated = memory.of_step(cfg, ALONE, *build.networks(cfg)).checkpoint
    assert estimated == pytest.approx((tmp_path / "a.pth").stat().st_size, rel=0.05)


def drawn_batch(cfg):
    count = cfg.TRAIN.BATCH_SIZE_PER_GPU
    return batch_of([torch.randn(count, 3, size, size) for size in build.augmentation(cfg).sizes])


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


MANY_PROTOTYPES = {
    "HEAD__OUT_DIM": 2**16,
    "HEAD__BOTTLENECK_DIM": 256,
    "TRAIN__BATCH_SIZE_PER_GPU": 2,
}


@pytest.mark.parametrize("options", [SWIN, SWIN | MANY_PROTOTYPES], ids=["crops", "prototypes"])
def test_the_estimate_is_near_a_measured_peak(options):
    """Near the growth of a whole process, which has the allocator's share in it."""
    (measured,) = found_by_each(1, memory_of_two_steps, options)
    cfg = small_config(**options)
    found = memory.of_step(cfg, ALONE, *build.networks(cfg))
    assert measured > 0.4 * GIB  # so that libraries are a small part of it
    assert found.peak == pytest.approx(measured, rel=0.2)


def estimate(**options) -> memory.StepMemory:
    cfg = small_config(**{"LOSS__OBJECTIVE": "dino", "HEAD__OUT_DIM": 16} | options)
    return memory.of_step(cfg, ALONE, *build.networks(cfg))


def test_the_estimate_follows_batch_precision_and_checkpointing():
    few, many = (estimate(MODEL__DEPTHS=[6], TRAIN__BATCH_SIZE_PER_GPU=n) for n in (3, 60))
    assert many.crops == 20 * few.crops
    assert many.activations == pytest.approx(20 * few.activations, rel=0.05)
    options = {"MODEL__DEPTHS": [6], "TRAIN__BATCH_SIZE_PER_GPU": 60}
    half = estimate(**options, TRAIN__PRECISION="bf16")
    assert 0.5 < half.activations / many.activations < 0.8
    less = estimate(**options, TRAIN__CHECKPOINTING=True)
    assert less.activations < 0.3 * many.activations
    assert less.peak < 0.8 * many.peak


def test_what_a_forward_keeps_is_what_autograd_saves():
    """A ReLU keeps its result, a product both factors; what is kept twice counts once."""

    class Squares(torch.nn.Module):
        def forward(self, crops):
            (images,) = crops
            x = images * torch.ones(1, requires_grad=True)
            return x.relu() * x.relu()

    crops = [torch.ones(5, 3, 4, 4)]
    relu = 4 * crops[0].numel()
    # What the first product keeps are the crops, which are counted elsewhere.
    assert memory.kept_by_forward(Squares(), crops) == 2 * relu


def test_an_objective_that_contrasts_is_estimated_by_its_own_crops_and_queue():
    """One crop of each image, in student and teacher; a queue where the centres were."""
    options = {"MODEL__ARCH": "swin_tiny", "MODEL__DEPTHS": [2, 2], "MODEL__NUM_HEADS": [1, 2]}
    options |= {"MODEL__EMBED_DIM": 32, "MODEL__PATCH_SIZE": 4, "AUG__LOCAL_CROPS_NUMBER": []}
    options |= {"HEAD__OUT_DIM": 64, "MOCO__QUEUE": 1000}
    dino, moco, lcr = (estimate(**options, LOSS__OBJECTIVE=o) for o in ("dino", "moco_v2", "lcr"))
    queue, place = 4 * 1000 * 32, 8  # float32 keys, an int64
    assert moco.carried == lcr.carried == queue + place
    assert dino.carried == 4 * 64
    assert moco.activations == pytest.approx(dino.activations / 2, rel=0.1)
    assert moco.activations < lcr.activations  # the branch's
    assert (dino.loss > 0, moco.loss) == (True, 0)


def test_the_flag_is_pretrainings_alone_and_takes_no_value():
    assert cli.parse("", ["--check"]).extra == {"--check": True}
    assert cli.parse("", []).extra == {}
    assert cli.parse("", ["--check", "SEED", "3"]).cfg.SEED == 3
    with pytest.raises(InputError, match=r"TRAIN\.EPOCH\b"):
        cli.parse("", ["--check", "TRAIN.EPOCH", "3"])
    with pytest.raises(InputError, match="--check"):
        cli.parse("", ["--check=yes"])
    with pytest.raises(InputError, match="unknown argument '--check'"):
        cli.parse("", ["--check"], cli.KNN)


def test_two_processes_speak_once(data, tmp_path, environment):
    out = tmp_path / "out"
    words = f"{NETWORK} DATA.PATH {data} OUTPUT_DIR {out} DATA.MAX_BAD 0.1 LOSS.OBJECTIVE cmd"
    done = run_group(2, "main_cmd.py", "--check", *words.split(), environment=environment)
    assert done.stdout.count("images per step: 16") == 1
    assert done.stdout.count("the run can work") == 1
    found = found_in(out)
    assert found["batch"]["images_per_step"] == 16
    assert found["memory"]["processes_here"] == 2
    assert len(found["images"]["unreadable"]) == 1
    assert os.listdir(out) == ["check.json"]


def test_a_short_memory_is_a_sentence_with_what_can_be_done():
    (sentence,) = machine.short("here", 2 * GIB, GIB)
    assert "about 2.00 GiB of memory on here, and 1.00 GiB are free: lower --batch_si" in sentence
    assert [*machine.short("here", GIB, 2 * GIB)] == []


def test_what_goes_to_the_device_is_crops_of_bytes_or_padded_images():
    common = {"TRAIN__BATCH_SIZE_PER_GPU": 2, "DATA__CACHE_SIZE": 40}
    by_workers = small_config(**common, DATA__CROPS="workers")
    assert memory.moved_size(by_workers, []) == 2 * 3 * (2 * 32**2 + 2 * 16**2)
    by_batch = small_config(**common, DATA__CROPS="device")
    # One of a side of 80 and one that is turned; one of 40 x 40 and one of 60 x 40.
    sizes = [(80, 40), (40, 80), (400, 400), (120, 80)]
    assert memory.moved_size(by_batch, sizes) == 2 * 3 * (80 * 80 + 60 * 40) // 2
    assert memory.moved_size(by_batch, []) == 0


def test_batches_that_shared_memory_has_no_room_for_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cfg = small_config(DATA__WORKERS=1, DATA__CROPS="workers")
    machine.refuse_small_shared(cfg, 4 * 2**20, 8 * 2**20)
    with pytest.raises(InputError) as caught:
        machine.refuse_small_shared(cfg, 4 * 2**20, 7 * 2**20)
    assert str(caught.value) == (
        "the loader's batches take about 8.0 MiB of shared memory, and /dev/shm has 7.0 MiB for "
        "them: make it larger (docker run --shm-size), or lower --num_workers, now 1"
    )
    machine.refuse_small_shared(small_config(DATA__WORKERS=0), 0, 0)


SMALL_SHARED = "mount -t tmpfs -o size=64k tmpfs /dev/shm && exec"


def test_a_small_shared_memory_is_a_sentence_before_the_first_step(command, environment, tmp_path):
    """In a mount namespace of its own; 120 kB of batches."""
    mounted = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*mounted, f"{SMALL_SHARED} true"], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    line = shlex.join([sys.executable, *command(tmp_path, "DATA.WORKERS 1")])
    done = subprocess.run(
        [*mounted, f"{SMALL_SHARED} {line}"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "and /dev/shm has 0.1 MiB for them: make it larger (docker run" in done.stderr
    assert "img/s" not in done.stdout


def test_a_disk_too_small_for_a_checkpoint_is_refused_and_one_for_few_is_warned_of(tmp_path):
    cfg = small_config(DATA__WORKERS=0)
    disk = machine.disk_needed(cfg, tmp_path, 2**20)
    assert [*machine.warnings(cfg, [], disk)] == []
    assert [*machine.warnings(cfg, [], None)] == []
    (warning,) = machine.warnings(cfg, [], disk | {"free_bytes": 2**21})
    assert "the checkpoints will take about 3.0 MiB in" in warning
    with pytest.raises(InputError, match=r"a checkpoint takes about 1\.0 MiB .* make room, or"):
        [*machine.warnings(cfg, [], disk | {"free_bytes": 2**19})]
