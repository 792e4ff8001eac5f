"""Whether two sets are the same: by what their files hold, each of which is read once."""

import json
import os
import shutil
from pathlib import Path

import pytest

from datasets import contents
from datasets.contents import cache_folder, digests
from datasets.folder import ImageFolder
from datasets.shards import ImageShards
from tests.datasets.photographs import edit, encoded, noise
from tests.datasets.test_shards import write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache folder, in which hashes of files are kept however young these are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "SETTLED_SECONDS", -1)
    return tmp_path / "cache"


def bitmap(seed: int) -> bytes:
    """A BMP file, as long as any other."""
    return encoded(noise(seed, (30, 20)), "BMP")


def bitmaps(folder: Path, first: int = 0) -> Path:
    """Six BMP files of two classes, of the same names and sizes whatever they hold."""
    for number in range(6):
        path = folder / f"class{number % 2}" / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bitmap(first + number))
    return folder


def tars(folder: Path, first: int = 0) -> Path:
    for shard in range(2):
        members = [(f"{i}.bmp", bitmap(first + i)) for i in (2 * shard, 2 * shard + 1)]
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.mark.parametrize(
    ("write", "read", "one"),
    [(bitmaps, ImageFolder, "class1/3.bmp"), (tars, ImageShards, "1.tar")],
)
def test_contents_alone_tell_sets_of_the_same_names_apart(write, read, one, tmp_path):
    first, second = write(tmp_path / "first"), write(tmp_path / "second", first=10)
    assert read(first).fingerprint != read(second).fingerprint
    shutil.copytree(first, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.*"):
        os.utime(path, (1, 1))
    assert read(tmp_path / "copy").fingerprint == read(first).fingerprint
    before = read(first).fingerprint
    (first / one).touch()
    assert read(first).fingerprint == before
    edit(first / one)
    assert read(first).fingerprint != before
    edit(first / one)
    assert read(first).fingerprint == before


def kept(folder: Path) -> Path:
    return cache_folder("contents", folder) / "digests.json"


def test_a_file_is_read_once(tmp_path):
    names = ["class0/0.bmp", "class1/1.bmp"]
    folder = bitmaps(tmp_path / "set")
    os.utime(folder / names[0], (2**33, 2**33))  # long from now: only the record's time is true
    found = digests(folder, names)
    stored = json.loads(kept(folder).read_text())
    assert [stored["files"][name][-1] for name in names] == found
    for name, entry in stored["files"].items():
        entry[-1] = f"of {name}"
    kept(folder).write_text(json.dumps(stored))
    assert digests(folder, names) == [f"of {name}" for name in names]
    edit(folder / names[0])
    assert digests(folder, [*names, "class0/2.bmp"])[1] == "of class1/1.bmp"
    assert "of class0" not in kept(folder).read_text()


def test_the_hash_of_a_file_that_may_change_within_a_tick_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "SETTLED_SECONDS", 60)
    folder = bitmaps(tmp_path / "set")
    assert digests(folder, ["class0/0.bmp"]) != [""]
    assert not kept(folder).exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0, "files": {}}', '{"format": 1}'])
def test_hashes_that_are_damaged_are_made_again(text, tmp_path):
    folder = bitmaps(tmp_path / "set")
    found = digests(folder, ["class0/0.bmp"])
    kept(folder).write_text(text)
    assert digests(folder, ["class0/0.bmp"]) == found
    assert json.loads(kept(folder).read_text())["files"].keys() == {"class0/0.bmp"}


def test_without_a_cache_every_file_is_read(tmp_path, cache, monkeypatch):
    folder = bitmaps(tmp_path / "set")
    cache.write_text("no folder")
    found = digests(folder, ["class0/0.bmp"])
    assert digests(folder, ["class0/0.bmp"]) == found != [""]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "nowhere")
    before = sorted(Path.cwd().iterdir())
    assert digests(folder, ["class0/0.bmp"]) == found
    assert sorted(Path.cwd().iterdir()) == before


def test_what_cannot_be_read_has_no_hash_and_a_pipe_is_not_waited_for(tmp_path):
    folder = bitmaps(tmp_path / "set")
    os.mkfifo(folder / "pipe.bmp")
    (folder / "folder.bmp").mkdir()
    names = ["pipe.bmp", "folder.bmp", "none.bmp", "class0/0.bmp"]
    found = digests(folder, names)
    assert found[:3] == [""] * 3
    assert found[3]
    assert json.loads(kept(folder).read_text())["files"].keys() == {"class0/0.bmp"}


def test_a_large_file_is_read_in_blocks_from_its_first_to_its_last(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "BLOCK", 16)
    monkeypatch.setattr(contents, "BLOCKS", 3)
    path = tmp_path / "large.bmp"
    path.write_bytes(bytes(1000))
    before = digests(tmp_path, [path.name])
    for place, seen in ((0, True), (100, False), (500, True), (999, True)):
        edit(path, place)
        assert (digests(tmp_path, [path.name]) != before) == seen, place
        edit(path, place)
    path.write_bytes(bytes(1001))
    assert digests(tmp_path, [path.name]) != before


def test_of_very_many_files_some_are_read_and_of_the_others_the_size_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "MOST_FILES", 2)
    folder = bitmaps(tmp_path / "set")
    names = [f"class{i % 2}/{i}.bmp" for i in range(6)]
    found = digests(folder, names)
    size = str((folder / names[0]).stat().st_size)
    assert [digest == size for digest in found] == [False, True, True, False, True, True]
    assert len(json.loads(kept(folder).read_text())["files"]) == 2
