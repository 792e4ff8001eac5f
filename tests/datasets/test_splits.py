"""Train and test splits of a folder of folders."""

import pytest

from datasets.fine_grained import load_splits
from tests.datasets import benchmark_trees as trees
from tests.datasets.test_benchmarks import error


@pytest.mark.parametrize("name", ["folder", "imagenet1k"])
@pytest.mark.parametrize("second", ["val", "test"])
def test_folder_with_two_splits(name, second, tmp_path):
    trees.folders(tmp_path, second=second)
    splits = load_splits(name, tmp_path)
    assert (splits.name, splits.notes) == (name, [])
    assert splits.train.root == tmp_path / "train"
    assert splits.test.root == tmp_path / second
    assert splits.train.paths[:4] == ["auk/0.jpg", "auk/1.jpg", "auk/2.jpg", "owl/0.jpg"]
    assert splits.test.paths == [f"{c}/{i}.jpg" for c in ("auk", "owl", "wren") for i in (3, 4)]
    assert splits.train.classes == splits.test.classes == ["auk", "owl", "wren"]
    assert splits.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert splits.test.load(5).size == (32, 32)


def test_val_goes_before_test(tmp_path):
    trees.folders(tmp_path)
    trees.folders(tmp_path, second="test")
    splits = load_splits("folder", tmp_path)
    assert splits.test.root == tmp_path / "val"
    assert splits.notes == [f"{tmp_path} has val and test: val is used"]


@pytest.mark.parametrize(
    "names", [("train", "validation"), ("Training", "Valid"), ("train", "Test")]
)
def test_splits_may_have_the_other_names_of_the_field(names, tmp_path):
    trees.folders(tmp_path)
    for plain, name in zip(("train", "val"), names, strict=True):
        (tmp_path / plain).rename(tmp_path / name)
    splits = load_splits("folder", tmp_path)
    assert [splits.train.root.name, splits.test.root.name] == [*names]
    assert (len(splits.train), len(splits.test), splits.notes) == (9, 6, [])


def test_classes_that_the_test_split_lacks_are_noted_and_keep_trains_numbers(tmp_path):
    trees.folders(tmp_path)
    (tmp_path / "val" / "owl").rename(tmp_path / "away")
    splits = load_splits("folder", tmp_path)
    assert splits.test.labels.tolist() == [0, 0, 2, 2]
    assert splits.test.classes == ["auk", "owl", "wren"]
    assert splits.notes == [f"{tmp_path}/val has no images of 1 of the 3 classes: owl"]


def test_what_makes_figures_mean_less_is_noted(tmp_path):
    """One class, as a folder too deep gives; and classes without an image."""
    for split in ("train", "val"):
        trees.save_image(tmp_path / split / "images" / "x.jpg", 0, 0)
    for name in ("owl", "wren", ".cache", "@eaDir"):
        (tmp_path / "train" / name).mkdir()
    assert load_splits("folder", tmp_path).notes == [
        "all images are of one class (images): every figure is 100 %",
        f"{tmp_path}/train has subfolders without images, which are no classes: 2 (owl, wren)",
    ]


def test_classes_that_train_lacks_are_refused(tmp_path):
    trees.folders(tmp_path)
    for n in range(7):
        trees.save_image(tmp_path / "val" / f"new{n}" / "x.jpg", 0, n)
    text = error("folder", tmp_path)
    assert f"{tmp_path}/val has classes that {tmp_path}/train lacks: new0, new1, new2, new3" in text
    assert "new4 and 2 more. Both must use the same names" in text
    assert "new5" not in text


def test_folders_without_their_splits_are_described(tmp_path):
    assert "has no train folder: " in error("folder", tmp_path)
    assert error("folder", tmp_path).endswith(f"{tmp_path} holds nothing")
    for n in range(7):
        (tmp_path / f"class{n}").mkdir()
    text = error("folder", tmp_path)
    assert f"{tmp_path} has no train folder: expected train and val (or test) in it" in text
    assert text.endswith("holds class0, class1, class2, class3, class4 and 2 more")
    (tmp_path / "train").mkdir()
    assert f"{tmp_path} has no val or test folder: " in error("folder", tmp_path)
    assert f"{tmp_path}/none does not exist: give" in error("folder", tmp_path / "none")


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_outside_class_folders_are_refused(split, tmp_path):
    trees.folders(tmp_path)
    trees.save_image(tmp_path / split / "stray.jpg", 0, 0)
    text = error("folder", tmp_path)
    assert f"{tmp_path}/{split} has images outside class subfolders: an evaluation needs" in text
    assert text.endswith("move or remove stray.jpg")


def test_a_class_that_differs_by_a_case_or_a_space_is_shown_beside_its_neighbour(tmp_path):
    trees.folders(tmp_path)
    (tmp_path / "val" / "wren").rename(tmp_path / "val" / "wren ")
    assert error("folder", tmp_path).endswith("; 'wren ' there is nearest to 'wren' here")
