"""Lists of names in one buffer: what they hold, and what they cost a loader's process."""

import gc
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from datasets.fine_grained import build_dataset, load_splits
from datasets.folder import ImageFolder, LabelledImages
from datasets.strings import Strings
from tests.processes import found_by_each, start_fork_server
from utils.distributed import World
from utils.errors import InputError

# Bytes that are no UTF-8 (Python has them as surrogates, which sort below U+E000), one letter
# composed and decomposed, and characters of two to four bytes.
ODD = [b"caf\xe9", b"\xff\xfe", "caf\u00e9".encode(), "cafe\u0301".encode()]
ODD += ["\ue000".encode(), "\U0001f426 wren".encode(), b"a-b", b"a", b"a b", b"A"]
NAMES = 200_000


def test_strings_are_those_they_were_made_of():
    words = [os.fsdecode(name) for name in ODD]
    strings = Strings.of(words)
    for found in (strings, pickle.loads(pickle.dumps(strings)), Strings(strings.packed)):
        assert [found[i] for i in range(-len(words), len(words))] == 2 * words
        assert (found, found[2:5], found[::-2]) == (words, words[2:5], words[::-2])
    assert strings != words[:-1]
    with pytest.raises(IndexError):
        strings[len(words)]
    assert [*Strings.of([])] == []
    assert [*strings] == words


def test_odd_names_have_the_order_and_the_labels_of_lists_of_strings(tmp_path):
    for name in ODD:
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        for file in ODD:
            Path(os.fsdecode(folder), os.fsdecode(file + b".png")).touch()
    images = ImageFolder(tmp_path)
    classes = sorted(os.listdir(tmp_path))
    paths = sorted(f"{c}/{name}" for c in classes for name in os.listdir(tmp_path / c))
    assert (images.classes, images.paths) == (classes, paths)
    assert [classes[label] for label in images.labels] == [p.split("/")[0] for p in paths]
    assert all(os.path.exists(images.name(place)) for place in range(len(paths)))


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def read_names(pipe, images: LabelledImages | None) -> None:
    """Send the private memory before and after all names are read, and their letters."""
    gc.disable()  # a collection writes into all objects of the interpreter
    letters_of(LabelledImages("", ["a"] * 9, [1] * 9, []))  # what the first ones take is taken once
    before = private_bytes()
    images = images or pipe.recv()
    letters = letters_of(images)
    pipe.send((before, private_bytes(), letters))


def letters_of(images: LabelledImages) -> int:
    places = range(len(images))
    return sum(len(images.paths[place]) + images.labels[place].item() for place in places)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells the figures")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_loaders_process_has_no_copy_of_the_names(method):
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i:032d}.JPEG" for i in range(NAMES)]
    images = LabelledImages("/data", names, [1] * NAMES, ["a", "b"])
    start_fork_server()
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    forked = method == "fork"
    process = context.Process(target=read_names, args=(theirs, images if forked else None))
    process.start()
    if not forked:
        ours.send(images)
    before, after, letters = ours.recv()
    process.join()
    assert images.paths == names  # whose memory has moved where it was sent
    assert letters == sum(len(name) + 1 for name in names)
    # They are 11 MiB, and strings of Python 20 MiB.
    assert after - before < 8 * 2**20


def listed(world: World, folder: str, elsewhere: str) -> list[str]:
    """What each process is told of; the second one stands elsewhere and is given no folder."""
    if not world.is_main:
        os.chdir(elsewhere)
    root = folder if world.is_main else f"{folder}/none"
    splits, images = load_splits("folder", root), build_dataset("folder", f"{root}/train")
    assert (splits.train.paths, splits.train.root) == (images.paths, Path(folder, "train"))
    found = [*splits.train.paths, *splits.test.paths, *splits.test.labels.tolist()]
    try:
        build_dataset("folder", f"{folder}/empty")  # refused by the first process
    except InputError as error:
        found.append(str(error))
    return found


def test_one_process_lists_the_folders_for_all(tmp_path):
    for name in ("data/train/a/1.png", "data/train/b/2.png", "data/val/b/3.png", "data/away/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "data/empty").mkdir()
    (tmp_path / "elsewhere").mkdir()
    first, second = found_by_each(2, listed, str(tmp_path / "data"), str(tmp_path / "elsewhere"))
    assert first == second
    assert first[:4] == ["a/1.png", "b/2.png", "b/3.png", 1]
    assert first[4].startswith(f"the data folder {tmp_path}/data/empty holds no images")
