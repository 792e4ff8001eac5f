"""The synthetic set as a folder, and the command that writes it."""

import collections
import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from datasets.synthetic import VAL_START, read_parts, write_folder
from datasets.synthetic_images import DIFFICULTIES, SyntheticConfig, render
from tests.processes import run_python, start_python
from utils.errors import InputError

EASY = DIFFICULTIES["easy"]


# --- folders ---


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "set"
    assert write_folder(EASY, 5, folder, train=40, val=23)
    return folder


def _snapshot(folder: Path) -> dict:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_folder_agrees_with_image_folder_and_parts(written):
    content = json.loads((written / "parts.json").read_text())
    boxes = {}
    for split in ("train", "val"):
        dataset = ImageFolder(written / split)
        assert tuple(dataset.classes) == EASY.class_names
        for path, label in dataset.samples:
            key = Path(path).relative_to(written).as_posix()
            entry = content["images"][key]
            sample = render(EASY, 5, int(Path(path).stem), label)
            assert np.array_equal(np.asarray(Image.open(path)), sample.image)
            box = list(sample.part_box)
            assert entry == {"box": box, "label": label, "coarse": label // 5}
            boxes[key] = tuple(box)
    assert boxes == read_parts(written)
    assert SyntheticConfig(**content["config"]) == EASY
    assert (content["format"], content["seed"]) == (1, 5)


def test_classes_are_balanced_and_each_split_has_numbers_of_its_own(written):
    """So validation images stay the same whatever the number of training images."""
    train, val = (list((written / split).rglob("*.png")) for split in ("train", "val"))
    assert set(collections.Counter(p.parent.name for p in train).values()) == {4}
    assert set(collections.Counter(p.parent.name for p in val).values()) == {2, 3}
    assert sorted(int(p.stem) for p in train) == [*range(40)]
    assert sorted(int(p.stem) for p in val) == [*range(VAL_START, VAL_START + 23)]


def test_writing_the_same_set_again_changes_nothing(written):
    before = _snapshot(written)
    assert not write_folder(EASY, 5, written, train=40, val=23)
    assert _snapshot(written) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "seed"),
        ({"train": 41}, "train"),
        ({"val": 24}, "val"),
        ({"config": dataclasses.replace(EASY, clutter=4)}, "clutter"),
    ],
)
def test_another_set_is_refused_and_left_alone(written, change, named):
    before = _snapshot(written)
    arguments = {"config": EASY, "seed": 5, "folder": written, "train": 40, "val": 23, **change}
    with pytest.raises(InputError, match=rf"another synthetic set \(its {named} differ"):
        write_folder(**arguments)
    assert _snapshot(written) == before
    assert [path.name for path in written.parent.iterdir()] == ["set"]


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a synthetic set"):
        write_folder(EASY, 0, tmp_path, train=10, val=10)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_empty_folder_is_filled(tmp_path):
    assert write_folder(EASY, 0, tmp_path / "a" / "b", train=10, val=10)
    (tmp_path / "empty").mkdir()
    assert write_folder(EASY, 0, tmp_path / "empty", train=10, val=10)
    assert len(read_parts(tmp_path / "empty")) == 20


def test_too_few_images_for_the_classes_are_refused(tmp_path):
    with pytest.raises(InputError, match="val is 9; give a whole number from 10"):
        write_folder(EASY, 0, tmp_path / "set", train=10, val=9)
    assert not (tmp_path / "set").exists()


def test_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        write_folder(EASY, 0, tmp_path / "file" / "set", train=10, val=10)


def test_killed_run_leaves_no_folder_behind(tmp_path):
    """The folder appears by one rename, so a killed run cannot pass for a finished one."""
    folder = tmp_path / "set"
    words = ("-m", "datasets.synthetic", "--output", folder, "--train", 400000)
    process = start_python(*words)
    try:
        while not any(tmp_path.rglob("*.png")):
            assert process.poll() is None
        assert not folder.exists()
    finally:
        process.kill()
        process.wait()
    assert not folder.exists()
    assert write_folder(EASY, 0, folder, train=10, val=10)


BOX = '{"config": {"size": 64}, "images": {"a.png": {"box": [1]}}}'


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"config": {"size": 64}}', '{"config": {}, "images": {}}', BOX]
)
def test_unreadable_parts_are_reported(tmp_path, text):
    if text is not None:
        (tmp_path / "parts.json").write_text(text)
    with pytest.raises(InputError, match=r"parts.json cannot be read \(.*give a folder written"):
        read_parts(tmp_path)


# --- command line ---


def _run(*arguments: str) -> subprocess.CompletedProcess:
    words = ("-m", "datasets.synthetic", *arguments)
    return run_python(*words, code=None)


def test_command_line_writes_a_preset_with_overrides(tmp_path):
    folder = tmp_path / "set"
    arguments = ["--output", folder, "--train", 20, "--val", 12, "--difficulty", "hard"]
    arguments += ["--clutter", 2, "--fine-classes", 12, "--size", 48, "--seed", 9]
    first = _run(*arguments)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.startswith("wrote 20 training and 12 validation images of 12 classes")
    assert first.stdout.count("\n") == 1
    content = json.loads((folder / "parts.json").read_text())
    expected = dataclasses.replace(DIFFICULTIES["hard"], clutter=2, fine_classes=12, size=48)
    assert SyntheticConfig(**content["config"]) == expected
    assert content["seed"] == 9
    assert _run(*arguments).stdout.startswith("found 20 training")
    refused = _run(*arguments, "--seed", 10)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


def test_command_line_help_lists_every_setting():
    text = _run("--help").stdout
    for field in dataclasses.fields(SyntheticConfig):
        assert f"--{field.name.replace('_', '-')} " in text
