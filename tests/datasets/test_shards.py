"""Tar shards: writing and reading them, their index, a run over them."""

import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from datasets.fine_grained import build_dataset, load_splits
from datasets.folder import ImageFolder, UnreadableImage
from datasets.loader import epoch_order
from datasets.shards import (
    INDEX_FOLDER,
    OPEN_SHARDS,
    WINDOW_IMAGES,
    ImageShards,
    ShardOrder,
    write_shards,
)
from tests.conftest import save_images
from tests.datasets.photographs import EXIF_TURNED, encoded, noise
from tests.processes import found_by_each, run_python
from tests.runs import assert_same_run
from utils.errors import InputError
from utils.logging import setup


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven images of two classes, one a JPEG on its side."""
    save_images(tmp_path / "folder" / "wren", 4, 0)
    save_images(tmp_path / "folder" / "auk", 2, 1)
    picture(9).save(tmp_path / "folder" / "auk" / "a.b.JPG", exif=EXIF_TURNED)
    return tmp_path / "folder"


@pytest.fixture
def shards(folder, tmp_path) -> Path:
    write_shards(folder, tmp_path / "shards", 3)
    return tmp_path / "shards"


def picture(seed: int) -> Image.Image:
    return noise(seed, (10, 6))


def png(seed: int = 0) -> bytes:
    return encoded(picture(seed))


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def numbered(path: Path, seeds: range) -> Path:
    """A shard of one PNG for each seed."""
    return write_tar(path, [(f"{seed:04d}.png", png(seed)) for seed in seeds])


def seeds_of(images: ImageShards) -> list[int]:
    """Which `picture` every image is."""
    known = {picture(seed).tobytes(): seed for seed in range(100)}
    return [known[images.load(i).tobytes()] for i in range(len(images))]


# Writing and reading


def test_a_folder_comes_back_from_its_shards(folder, shards):
    images, files = ImageShards(shards), ImageFolder(folder)
    assert sorted(path.name for path in shards.glob("*.tar")) == [
        f"shard-{i:06d}.tar" for i in range(3)
    ]
    assert images.counts == [3, 3, 1]
    assert len(images) == len(files) == 7
    order = [int(Path(path.split(":")[1]).stem) for path in map(images.name, range(7))]
    assert sorted(order) == list(range(7))
    assert order != sorted(order)  # the classes are mixed
    for i, number in enumerate(order):
        assert np.array_equal(np.asarray(images.load(i)), np.asarray(files.load(number)))
    with pytest.raises(IndexError):
        images.load(7)


def test_webdataset_reads_the_shards_with_their_labels(folder, shards):
    files = ImageFolder(folder)
    found = {}
    for path in shards.glob("*.tar"):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            number = int(sample["__key__"])
            suffix = Path(files.paths[number]).suffix[1:].lower()
            assert sample[suffix] == (folder / files.paths[number]).read_bytes()
            found[number] = int(sample["cls"])
    assert [found[i] for i in range(7)] == files.labels.tolist()
    assert (shards / "classes.txt").read_text().split() == files.classes == ["auk", "wren"]


def test_the_same_folder_gives_the_same_bytes(folder, shards, tmp_path):
    for path in folder.rglob("*.*"):
        os.utime(path, (1, 1))
    write_shards(folder, tmp_path / "again", 3)
    for path in shards.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_the_command_writes_once_and_then_refuses(folder, environment, tmp_path):
    output = tmp_path / "a%d" / "out"
    words = ("-m", "datasets.shards", "--data_path", folder, "--output", output)
    words = (*words, "--images_per_shard", 4)
    (folder / "auk" / "notes.txt").touch()
    done = run_python(*words, environment=environment)
    assert done.stdout == (
        f"{folder}: passed over, not images by their names: 1 .txt\n"
        f"wrote 7 images in 2 shards to {output}\n"
    )
    assert sorted(os.listdir(output)) == ["classes.txt", "shard-000000.tar", "shard-000001.tar"]
    assert os.listdir(output.parent) == ["out"]
    before = {path: path.read_bytes() for path in output.iterdir()}
    done = run_python(*words, environment=environment, code=2)
    assert done.stderr == (
        f"error: --output {output} already exists: choose another folder or delete it\n"
    )
    assert before == {path: path.read_bytes() for path in output.iterdir()}


def test_what_cannot_be_written_is_one_sentence(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/out could not be written: Not a directory"):
        write_shards(folder, tmp_path / "file" / "out")


def test_only_the_images_of_samples_count(tmp_path, capsys):
    """Of names with dots those that are no parts of a sample with an image."""
    names = ["bird.1.jpg", "bird.2.jpg", "bird.cls", "v1.0/cat.final.PNG", "dog.png"]
    names += ["dog.mask.png", "Dog.mask.png", "dog.v2.json", "plain", "v1.0/._dog.png"]
    names += ["./a/1.JPEG", "b/1.webp", "a/dog.side.png", "n" * 120 + "é/1.png"]
    members = [(name, png(i)) for i, name in enumerate(names)]
    write_tar(tmp_path / "x.tar", members)
    write_tar(tmp_path / "y.tar", members, tarfile.GNU_FORMAT)
    (tmp_path / "notes.txt").write_text("none")
    setup(is_main=True)
    for _ in range(2):  # by the tars, and by their index
        images = ImageShards(tmp_path)
        assert images.counts == [9, 9]
        assert seeds_of(images) == [0, 1, 3, 4, 6, 10, 11, 12, 13] * 2
        assert images.name(8) == f"{tmp_path}/x.tar:{names[-1]}"
        line = "by their names: 2 without an ending, 2 .cls, 2 .mask.png, 2 .v2.json, 2 hidden\n"
        assert capsys.readouterr().out.count(line) == 1


def test_shards_by_pattern_and_by_folder(tmp_path):
    for i in (2, 0, 1):
        numbered(tmp_path / "in" / f"t-{i:03d}.tar", range(2 * i, 2 * i + 2))
    assert seeds_of(ImageShards(tmp_path / "in")) == list(range(6))
    assert seeds_of(ImageShards(f"{tmp_path}/in/t-{{000..001}}.tar")) == list(range(4))
    assert seeds_of(ImageShards(tmp_path / "in" / "t-002.tar")) == [4, 5]
    assert isinstance(build_dataset("shards", tmp_path / "in"), ImageShards)
    with pytest.raises(InputError, match="'shards' is for pretraining and has no splits: evaluate"):
        load_splits("shards", tmp_path / "in")


def test_few_shards_are_open_at_once_and_none_in_a_copy(tmp_path):
    for i in range(OPEN_SHARDS + 10):
        numbered(tmp_path / "in" / f"{i:03d}.tar", range(i, i + 1))
    images = ImageShards(tmp_path / "in")
    before = len(os.listdir("/dev/fd"))
    copy = pickle.loads(pickle.dumps(images))
    assert seeds_of(copy) == seeds_of(images) == list(range(OPEN_SHARDS + 10))
    assert len(os.listdir("/dev/fd")) <= before + OPEN_SHARDS


# The index


def index_of(shard: Path) -> Path:
    return shard.parent / INDEX_FOLDER / f"{shard.name}.json"


def test_an_index_is_made_once_and_used_again(tmp_path):
    shard = numbered(tmp_path / "in" / "x.tar", range(3))
    assert seeds_of(ImageShards(shard)) == [0, 1, 2]
    # With other names the index shows that it is used.
    index_of(shard).write_text(index_of(shard).read_text().replace("0001.png", "of the index"))
    assert ImageShards(shard).name(1) == f"{shard}:of the index"


def test_an_index_is_made_again_for_a_changed_shard_alone(tmp_path):
    shard, other = (numbered(tmp_path / "in" / name, range(3)) for name in ("x.tar", "y.tar"))
    ImageShards(tmp_path / "in")
    kept = index_of(other).stat().st_mtime_ns
    status = shard.stat()
    numbered(shard, range(5, 8))  # the same size, and by the next line the same time
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert seeds_of(ImageShards(tmp_path / "in")) == [5, 6, 7, 0, 1, 2]
    numbered(shard, range(4))
    assert seeds_of(ImageShards(tmp_path / "in")) == [0, 1, 2, 3, 0, 1, 2]
    assert index_of(other).stat().st_mtime_ns == kept


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0}', '{"format": 1, "stamp": 3}'])
def test_a_damaged_index_is_made_again(text, tmp_path):
    shard = numbered(tmp_path / "in" / "x.tar", range(3))
    ImageShards(shard)
    whole = index_of(shard).read_text()
    index_of(shard).write_text(text)
    assert seeds_of(ImageShards(shard)) == [0, 1, 2]
    assert index_of(shard).read_text() == whole


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = [numbered(tmp_path / name / "x.tar", range(i, i + 2)) for i, name in enumerate("ab")]
    for shard in shards:
        # Stands in the way for root too, whom no permission stops.
        (shard.parent / INDEX_FOLDER).touch()
        shard.parent.chmod(0o555)
    for _ in range(2):
        assert [seeds_of(ImageShards(shard)) for shard in shards] == [[0, 1], [1, 2]]
        kept = list((tmp_path / "cache").rglob("x.tar.json"))
        assert len(kept) == 2
    for path in kept:
        path.unlink()
        path.parent.rmdir()
        path.parent.touch()
    assert seeds_of(ImageShards(shards[0])) == [0, 1]  # in memory alone
    for shard in shards:
        shard.parent.chmod(0o755)


# What is refused


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def test_further_names_of_a_file_are_images_too(tmp_path, capsys):
    """tar writes equal files that are linked to each other, as deduplication leaves them, once."""
    plain = tmp_path / "in"
    save_images(plain, 2, 0)
    (plain / "copy.png").hardlink_to(plain / "00.png")
    (plain / "soft.png").symlink_to("00.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("00.png", "01.png", "copy.png", "soft.png"):
            tar.add(plain / name, f"./{name}")
    setup(is_main=True)
    images = ImageShards(tmp_path)
    names = [images.name(index).rpartition("/")[2] for index in range(len(images))]
    assert names == ["00.png", "01.png", "copy.png"]
    assert images.source(2).read() == images.source(0).read() == (plain / "00.png").read_bytes()
    assert "passed over, not images by their names: 1 links and the like" in capsys.readouterr().out


def overwrite(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"damaged " * 64)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: cut(path, 600), "{0} cannot be read (unexpected end of data): copy or"),
        (lambda path: cut(path, 1024 + 200), "{0} cannot be read (it is cut short or damaged at"),
        (lambda path: cut(path, 2048), "{0} cannot be read (it is cut short or damaged at"),
        (lambda path: overwrite(path, 1024), "{0} cannot be read (it is cut short or damaged at"),
        (lambda path: path.write_bytes(b""), "{0} cannot be read (empty file): copy or write"),
        (lambda path: path.write_text("words" * 200), "{0} cannot be read ("),
        (lambda path: path.unlink(), "{0} does not exist (1 of 2 shards are missing): complete"),
        (lambda path: write_tar(path, [("1.cls", b"1")]), "{0} holds no images, but 1 .cls"),
        (lambda path: write_tar(path, []), "{0} holds no images, but nothing: remove"),
        (
            lambda path: write_tar(path, [("1.png", png()), ("2.png", png()), ("1.png", png())]),
            "{0} holds two images of the sample 1 (1.png and 1.png): write it again",
        ),
        (
            lambda path: write_tar(path, [("a/1.png", png()), ("a/1.jpg", png())]),
            "{0} holds two images of the sample a/1 (a/1.png and a/1.jpg)",
        ),
    ],
)
def test_a_bad_shard_is_named(damage, words, tmp_path):
    numbered(tmp_path / "t-0.tar", range(2))
    bad = numbered(tmp_path / "t-1.tar", range(2))
    damage(bad)
    with pytest.raises(InputError) as caught:
        ImageShards(f"{tmp_path}/t-{{0..1}}.tar")
    assert f"the shard {words.format(bad)}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{0}/none", "the data folder {0}/none does not exist"),
        ("{0}", "the data folder {0} holds no shards (files ending in .tar): put shards"),
        ("{0}/none.tar", "the shard {0}/none.tar does not exist (1 of 1 shards are missing)"),
        ("{0}/t-{{0..1.tar", "the shards {0}/t-{{0..1.tar cannot be expanded"),
        ("", "no data folder is named"),
    ],
)
def test_a_bad_pattern_is_named(pattern, words, tmp_path):
    with pytest.raises(InputError) as caught:
        ImageShards(pattern.format(tmp_path))
    assert words.format(tmp_path) in str(caught.value)


def read_first(world, images: ImageShards) -> str:
    try:
        return str(images.load(0).size)
    except UnreadableImage as error:
        return error.bad.reason


def test_a_shard_that_changes_under_a_run_gives_no_wrong_image(tmp_path):
    shard = numbered(tmp_path / "x.tar", range(3))
    images = ImageShards(shard)
    assert found_by_each(1, read_first, images) == ["(10, 6)"]
    numbered(shard, range(1, 4))
    os.utime(shard, (1, 1))
    # In a process that had not opened the old one.
    assert found_by_each(1, read_first, images) == ["its shard changed after it was indexed"]


# The order of an epoch


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [ShardOrder([1, 30, 7], 1, 1, seed)(epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len(torch.stack(orders).unique(dim=0)) == 3


def test_images_are_mixed_within_a_window_of_shards():
    order = ShardOrder([1000] * 60, 2, 1, 0)
    assert order.window == WINDOW_IMAGES
    for span in order.spans(0):
        shards = span.numpy() // 1000
        open_at_once = [len(set(shards[i : i + 64])) for i in range(0, len(shards) - 64, 64)]
        assert max(open_at_once) <= WINDOW_IMAGES // 1000 + 2
        assert np.median(open_at_once) >= WINDOW_IMAGES // 1000
        # Neighbours of a shard do not stay neighbours.
        assert np.mean(np.abs(np.diff(span.numpy())) == 1) < 0.01
        # Shards follow one another in an order of their own.
        first = list(dict.fromkeys(shards.tolist()))
        assert first != sorted(first)


def test_the_window_holds_four_large_shards():
    order = ShardOrder([6000] * 8, 1, 1, 0)
    assert order.window == 24000
    assert len(set(order.spans(0)[0][24000:24200].numpy() // 6000)) >= 4


# Runs


def test_a_run_over_shards_resumes_to_the_same_bits(pretrain, tmp_path):
    """The run meets no damaged image, because its order, the shards', leaves that one out."""
    counts = [5, 5, 5, 2]

    def left_out(seed: int) -> set[int]:
        return {ShardOrder(counts, 1, 8, seed)(epoch).tolist()[-1] for epoch in range(2)}

    seed, (bad,) = next((s, left_out(s)) for s in range(999) if len(left_out(s)) == 1)
    assert epoch_order(17, seed, 0)[-1] != bad
    data = [b"damaged" if i == bad else png(i) for i in range(17)]
    for number, first in enumerate((0, 5, 10, 15)):
        members = [(f"{i}.png", data[i]) for i in range(17)][first : first + counts[number]]
        write_tar(tmp_path / "shards" / f"t-{number}.tar", members)
    pattern = f"{tmp_path}/shards/t-{{0..3}}.tar"
    options = f"DATA.DATASET shards DATA.PATH {pattern} DATA.WORKERS 1 PRINT_FREQ 1"
    options += f" TRAIN.EPOCHS 2 CKPT.KEEP_EVERY 1 SEED {seed}"
    done = pretrain(tmp_path / "whole", options)
    assert f"17 images in {pattern}" in done.stdout
    indices = sorted((tmp_path / "shards" / INDEX_FOLDER).iterdir())
    made = [path.stat().st_mtime_ns for path in indices]
    assert len(made) == 4
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.copy(tmp_path / "run" / "checkpoint0001.pth", tmp_path / "run" / "checkpoint.pth")
    done = pretrain(tmp_path / "run", options)
    assert "at step 2" in done.stdout
    assert [path.stat().st_mtime_ns for path in indices] == made
    assert_same_run(tmp_path / "whole", tmp_path / "run")
