"""Official splits of the fine-grained benchmarks, read from miniatures in their own formats."""

import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import OxfordIIITPet

from datasets.benchmarks import Counts
from datasets.fine_grained import DATASETS, build_dataset, load_splits, prepare
from tests.datasets import benchmark_trees as trees
from utils.errors import InputError

NAMES = sorted(trees.BUILDERS)
# Name of the folder, number of classes, of training images, of test images.
OFFICIAL = {
    "cub": ("CUB_200_2011", 200, 5994, 5794),
    "cars": ("stanford_cars", 196, 8144, 8041),
    "aircraft": ("fgvc-aircraft-2013b", 100, 6667, 3333),
    "nabirds": ("nabirds", 555, 23929, 24633),
    "flowers": ("flowers-102", 102, 2040, 6149),
    "pets": ("oxford-iiit-pet", 37, 3680, 3669),
}
CLASSES = {
    "cub": ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"],
    "cars": ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo 2012"],
    "aircraft": ["707-320", "Cessna 172", "F-16A/B"],
    "nabirds": [
        "Common Goldeneye (Breeding male)",
        "Common Goldeneye (Female/Eclipse male)",
        "Bald Eagle (Adult, subadult)",
    ],
    "pets": ["Abyssinian", "American Bulldog", "Wheaten Terrier"],
    "flowers": ["pink primrose", "hard-leaved pocket orchid", "blackberry lily"],
}
# Two images for training and one for test of each class, class by class.
FILES = {
    "cub": [f"images/{c}/{c[4:]}_{i:04d}.jpg" for c in CLASSES["cub"] for i in range(3)],
    "cars": [
        f"cars_{split}/{n:05d}.jpg"
        for c in range(3)
        for split, n in (("train", 2 * c + 1), ("train", 2 * c + 2), ("test", c + 1))
    ],
    "aircraft": [f"images/{34958 + 17 * n:07d}.jpg" for n in range(9)],
    "nabirds": [
        f"images/{(295, 817, 1010)[n // 3]:04d}/{n:08x}21dc4d0cbfe14cae3c85c829.jpg"
        for n in range(9)
    ],
    "flowers": [f"jpg/image_{n:05d}.jpg" for n in range(1, 10)],
    "pets": [
        f"images/{breed}_{n}.jpg"
        for breed in ("Abyssinian", "american_bulldog", "wheaten_terrier")
        for n in (1, 2, 3)
    ],
}
PATHS = {
    name: ([path for n, path in enumerate(paths) if n % 3 < 2], paths[2::3])
    for name, paths in FILES.items()
}


def place(name: str, folder: Path) -> Path:
    """The folder that the images of a benchmark are relative to, of its official one."""
    return folder / "data" if name == "aircraft" else folder


def error(name: str, root: Path, partial: bool = True, read=load_splits) -> str:
    with pytest.raises(InputError) as caught:
        read(name, root, partial)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", NAMES)
def test_official_splits_with_labels_and_names(name, tmp_path):
    trees.BUILDERS[name](tmp_path, train=2, test=1)
    splits = load_splits(name, tmp_path, partial=True)
    numbers = (0, 1, 101) if name == "flowers" else (0, 1, 2)
    assert splits.name == name
    assert (splits.train.paths, splits.test.paths) == PATHS[name]
    assert splits.train.labels.tolist() == [n for n in numbers for _ in range(2)]
    assert splits.test.labels.tolist() == list(numbers)
    assert splits.train.classes == splits.test.classes
    assert len(splits.test.classes) == (102 if name == "flowers" else 3)
    assert [splits.test.classes[n] for n in numbers] == CLASSES[name]
    for images in (splits.train, splits.test):
        for i, label in enumerate(images.labels):
            hue = np.asarray(images.load(i)).mean(axis=(0, 1)).argmax()
            assert label == numbers[hue]


@pytest.mark.parametrize("name", NAMES)
def test_the_official_folder_may_be_named_itself_or_have_another_name(name, tmp_path, monkeypatch):
    folder = trees.BUILDERS[name](tmp_path)
    assert folder.name == OFFICIAL[name][0]
    outer = load_splits(name, tmp_path, partial=True)
    monkeypatch.chdir(folder)
    for root in (str(folder), "."):
        other = load_splits(name, root, partial=True)
        assert other.test.paths == outer.test.paths
        assert other.test.root == other.train.root == outer.test.root == place(name, folder)
    renamed = folder.rename(tmp_path / "renamed")
    assert len(load_splits(name, renamed, partial=True).train) == 9


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_checked_against_the_official_ones(name, tmp_path):
    folder = place(name, trees.BUILDERS[name](tmp_path))
    _, classes, training, test = OFFICIAL[name]
    listed = 102 if name == "flowers" else 3
    difference = (
        f"{name} in {folder} has {listed} classes, 9 training and 6 test images; the official "
        f"data set has {classes} classes, {training:,} training and {test:,} test images"
    )
    assert error(name, tmp_path, partial=False) == (
        f"{difference}: complete it, or set DATA.PARTIAL true to use what is there"
    )
    assert load_splits(name, tmp_path, partial=True).notes == [difference]
    whole = replace(DATASETS[name], counts=Counts(listed, 9, 6))
    assert whole.splits(name, tmp_path, partial=False).notes == []


@pytest.mark.parametrize("name", NAMES)
def test_pretraining_takes_the_training_split_alone(name, tmp_path, caplog):
    """Without the test images and the labels, which it does not need."""
    folder = place(name, trees.BUILDERS[name](tmp_path, train=2, test=1))
    for path in PATHS[name][1]:
        (folder / path).unlink()
    needed = {name for layout in DATASETS[name].layouts for name in layout.training}
    for path in [path for path in tmp_path.rglob("*.*") if path.suffix in (".txt", ".mat")]:
        if path.name not in needed:
            path.unlink()
    dataset = build_dataset(name, tmp_path, partial=True)
    assert [dataset.root / path for path in dataset.paths] == [folder / p for p in PATHS[name][0]]
    assert (dataset.load(0).size, dataset.labels[0], dataset.classes) == ((32, 32), -1, [])
    counts = f"has 6 training images; the official data set has {OFFICIAL[name][2]:,} training imag"
    assert counts in caplog.text
    assert f"{counts}es: complete it, or set DATA" in error(name, tmp_path, False, build_dataset)


def test_pets_are_what_torchvision_reads(tmp_path):
    folder = trees.pets(tmp_path)
    splits = load_splits("pets", folder, partial=True)
    for ours, split in ((splits.train, "trainval"), (splits.test, "test")):
        theirs = OxfordIIITPet(tmp_path, split=split)
        assert ours.classes == theirs.classes
        assert len(ours) == len(theirs) > 0
        for i, (expected, target) in enumerate(theirs):
            assert ours.labels[i] == target
            assert np.array_equal(np.asarray(ours.load(i)), np.asarray(expected))


# What is missing


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_benchmark_is_described(name, tmp_path):
    trees.write_lines(tmp_path / "notes.md", [])
    text = error(name, tmp_path)
    assert (
        f"{name} was not found in {tmp_path}: expected {OFFICIAL[name][0]} in it, or this" in text
    )
    assert f"{tmp_path} holds notes.md. Of what an evaluation needs, nothing is there; " in text
    fetched = "DATA.DOWNLOAD true downloads it" in text
    assert fetched == (name in ("aircraft", "flowers", "pets"))
    # Every file that the error names is in a complete tree, and needed.
    trees.BUILDERS[name](tmp_path)
    layout = DATASETS[name].layouts[0]
    pieces = layout.training + layout.evaluation
    for piece in pieces:
        assert piece in text
        (found,) = tmp_path.rglob(piece)
        found.rename(found.with_name("away"))
        lacks = error(name, tmp_path)
        assert (f"downloads it once {tmp_path / OFFICIAL[name][0]} is removed" in lacks) == fetched
        assert f"{', '.join(p for p in pieces if p != piece)} is there; {piece}" in lacks
        found.with_name("away").rename(found)


@pytest.mark.parametrize("name", NAMES)
def test_listed_images_must_be_there_unless_partial(name, tmp_path):
    folder = place(name, trees.BUILDERS[name](tmp_path))
    whole = load_splits(name, tmp_path, partial=True)
    for path in (whole.train.paths[4], whole.test.paths[0]):
        (folder / path).unlink()
    lacks = (
        f"{name} in {folder} lacks 2 of the 15 images that it lists "
        f"(the first is {whole.train.paths[4]})"
    )
    assert error(name, tmp_path, partial=False).startswith(f"{lacks}: complete it, or set ")
    part = load_splits(name, tmp_path, partial=True)
    assert part.notes[0] == lacks
    assert "8 training and 5 test images; the official" in part.notes[1]
    assert part.test.paths == whole.test.paths[1:]
    labels = whole.train.labels.tolist()
    assert part.train.labels.tolist() == labels[:4] + labels[5:]
    assert part.train.classes == whole.train.classes


def test_a_split_without_images_is_refused(tmp_path):
    folder = trees.cars(tmp_path)
    for image in (folder / "cars_test").iterdir():
        image.unlink()
    text = error("cars", tmp_path)
    assert "9 training and 0 test images" in text
    assert text.endswith(": put the images where it lists them")


# Copies that are laid out otherwise


def move(tree: Path, **new: str) -> None:
    """Move folders and files of a tree, by their names before the suffix, to other places in it."""
    for stem, target in new.items():
        (old,) = (path for path in tree.rglob(f"{stem}*") if path.stem == stem)
        old = old.rename(tree / "away")
        (tree / target).parent.mkdir(parents=True, exist_ok=True)
        old.rename(tree / target)


LAYOUTS = {
    "cars": {
        "cars_train": "cars_train/cars_train",
        "cars_test": "archive/cars_test/cars_test",
        "cars_train_annos": "cars_train_annos.mat",
        "cars_test_annos_withlabels": "devkit/cars_test_annos_withlabels (1).mat",
    },
    "cub": {"CUB_200_2011": "archive/CUB_200_2011/CUB_200_2011"},
    "aircraft": {"fgvc-aircraft-2013b": "fgvc-aircraft-2013b/fgvc-aircraft-2013b"},
    "flowers": {"jpg": "102flowers/jpg", "flowers-102": "102"},
    "pets": {"images": "images/images", "annotations": "annotations/annotations"},
    "nabirds": {"nabirds": "birds/nabirds"},
}


@pytest.mark.parametrize("name", NAMES)
def test_other_layouts_are_read(name, tmp_path):
    """Those of Kaggle's copies, and of archives that were unpacked in a folder of their name."""
    trees.BUILDERS[name](tmp_path / "official")
    trees.BUILDERS[name](tmp_path / "other")
    move(tmp_path / "other", **LAYOUTS[name])
    for hidden in ("@eaDir", ".cache"):  # nothing in these is looked at
        (tmp_path / "other" / hidden / "images").mkdir(parents=True)
    expected, found = (load_splits(name, tmp_path / copy, True) for copy in ("official", "other"))
    for split in ("train", "test"):
        theirs, ours = getattr(expected, split), getattr(found, split)
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.classes == theirs.classes
        for path, other in zip(ours.paths, theirs.paths, strict=True):
            assert (ours.root / path).read_bytes() == (theirs.root / other).read_bytes()


def test_cars_may_lie_in_one_folder(tmp_path):
    folder = trees.cars_in_one_folder(tmp_path, train=2, test=1)
    splits = load_splits("cars", folder, partial=True)
    assert splits.train.paths == [f"car_ims/00000{n}.jpg" for n in (1, 2, 4, 5, 7, 8)]
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert splits.test.paths == [f"car_ims/00000{n}.jpg" for n in (3, 6, 9)]
    assert splits.test.labels.tolist() == [0, 1, 2]
    assert splits.test.classes == CLASSES["cars"]
    assert build_dataset("cars", folder, partial=True).paths == splits.train.paths


def test_what_is_there_of_a_copy_is_named(tmp_path):
    """Kaggle's copy of the cars has no file of labels for its folders; they have other numbers."""
    trees.cars_in_one_folder(tmp_path)
    (tmp_path / "car_ims").rename(tmp_path / "cars_train")
    text = error("cars", tmp_path)
    assert "Of what an evaluation needs, cars_train, cars_annos.mat is there; cars_test, " in text
    assert "cars_test_annos_withlabels*.mat, or else car_ims is missing" in text
    assert len(build_dataset("cars", tmp_path / "cars_train", partial=True)) == 15


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["cub", "nabirds", "aircraft", "pets"])
def test_metadata_may_have_been_saved_on_windows(name, encoding, tmp_path):
    trees.BUILDERS[name](tmp_path)
    expected = load_splits(name, tmp_path, True)
    for file in tmp_path.rglob("*.txt"):
        file.write_bytes(file.read_text().replace("\n", "\r\n").encode(encoding))
    found = load_splits(name, tmp_path, True)
    assert found.train.classes == expected.train.classes
    assert found.train.paths == expected.train.paths
    assert torch.equal(found.test.labels, expected.test.labels)


def test_an_unknown_data_set_has_its_nearest_name(tmp_path):
    for name, near in (("cubs", "cub"), ("Card", "cars"), ("NA-Birds", "nabirds")):
        text = f"there is no data set '{name}' (did you mean {near}?): use one of aircraft, cars"
        assert text in error(name, tmp_path)


# Broken metadata


def line(file: str, text: str) -> Callable[[Path], None]:
    """One more line at the end of a file."""

    def spoil(folder: Path) -> None:
        with open(folder / file, "a") as lines:
            lines.write(f"{text}\n")

    return spoil


def value(file: str, text: str) -> Callable[[Path], None]:
    """Another value in the first line of a file of keys and values."""

    def spoil(folder: Path) -> None:
        first, *others = (folder / file).read_text().splitlines()
        trees.write_lines(folder / file, [f"{first.split()[0]} {text}", *others])

    return spoil


def folder_for_classes(folder: Path) -> None:
    (folder / "classes.txt").unlink()
    (folder / "classes.txt").mkdir()


LISTS = "images.txt, train_test_split.txt, image_class_labels.txt list different images"


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("cub", line("images.txt", "16"), "images.txt has the line '16'"),
        ("cub", line("images.txt", "1 a.jpg"), "images.txt has two lines for '1'"),
        ("cub", line("image_class_labels.txt", "16 1"), LISTS),
        ("cub", line("train_test_split.txt", "16 1"), LISTS),
        ("cub", value("image_class_labels.txt", "77"), "there is no '77'"),
        ("cub", value("train_test_split.txt", "2"), "there is no '2'"),
        ("cub", folder_for_classes, "Is a directory"),
        ("pets", line("annotations/test.txt", "Beagle_2 1 1"), "has the line 'Beagle_2 1 1'"),
        ("pets", line("annotations/test.txt", "Abyssinian_9 one 1 1"), "invalid literal for int"),
        (
            "pets",
            line("annotations/test.txt", "Beagle_2 1 1 1"),
            "1 is both 'Abyssinian' and 'Beagle'",
        ),
        (
            "pets",
            line("annotations/test.txt", "Abyssinian_1 1 1 1"),
            "images/Abyssinian_1.jpg is listed for training and for test",
        ),
        ("cars", lambda f: (f / "devkit/cars_meta.mat").write_bytes(b"x" * 200), "mat file"),
        ("cars", lambda f: savemat(f / "devkit/cars_meta.mat", {"a": 1}), "there is no 'class_na"),
        (
            "flowers",
            lambda f: savemat(f / "setid.mat", {"trnid": [1], "valid": [99], "tstid": [2]}),
            "setid.mat names images beyond the 15 labelled ones",
        ),
        (
            "flowers",
            lambda f: savemat(f / "imagelabels.mat", {"labels": [103] * 15}),
            "jpg/image_00001.jpg has class 103, there are 102 classes",
        ),
        (
            "aircraft",
            line("data/images_variant_test.txt", "0000001 Concorde"),
            "there is no 'Concorde'",
        ),
    ],
)
def test_broken_metadata_are_one_sentence(name, spoil, reason, tmp_path):
    folder = trees.BUILDERS[name](tmp_path)
    spoil(folder)
    text = error(name, tmp_path)
    assert text.startswith(f"the metadata in {place(name, folder)} cannot be read (")
    assert reason in text
    assert text.endswith("): restore the official files")


# Downloads


@pytest.fixture
def no_network():
    """A proxy that refuses: no request leaves this machine."""
    proxies = dict.fromkeys(("http", "https"), "http://127.0.0.1:9")
    urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler(proxies)))
    yield
    urllib.request.install_opener(None)


@pytest.mark.parametrize("name", ["aircraft", "flowers", "pets"])
def test_a_download_that_fails_is_one_sentence(name, no_network, tmp_path):
    with pytest.raises(InputError) as caught:
        prepare(name, tmp_path / "new", fetch=True)
    text = str(caught.value)
    assert text.startswith(f"{name} could not be downloaded to {tmp_path}/new (")
    assert "Connection refused" in text
    assert f"put the official folder {OFFICIAL[name][0]} there yourself" in text
    assert "\n" not in text


def test_what_cannot_be_downloaded_says_where_it_is(tmp_path):
    for name, where in (
        ("cub", "Download it from https:"),
        ("cars", "address is gone: use a copy"),
    ):
        prepare(name, tmp_path, fetch=True)
        assert where in error(name, tmp_path)
        assert "DATA.DATASET folder pretrains on" in error(name, tmp_path, read=build_dataset)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_there_is_not_downloaded(name, tmp_path):
    trees.BUILDERS[name](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    prepare(name, tmp_path, fetch=True)
    assert len(load_splits(name, tmp_path, partial=True).train) == 9
    assert sorted(tmp_path.rglob("*")) == before
