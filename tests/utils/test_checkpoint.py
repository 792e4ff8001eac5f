"""Checkpoint files: whole or not there at all, found again, and plain data only."""

import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TextIO

import pytest
import torch
from PIL import Image

from tests.disk import forked, full_disk
from tests.runs import checkpoint_of, pretraining, small_config
from utils import checkpoint, config
from utils.checkpoint import BEST, LAST, PREVIOUS, NotIntact
from utils.errors import InputError


@pytest.mark.parametrize("missing", [1, 30, 2000, 3_000_000, 4_000_000, None])
@pytest.mark.parametrize("kept_as", [[], ["checkpoint0003.pth"]])
def test_a_full_disk_leaves_all_that_was_there(tmp_path, capfd, missing, kept_as):
    for step in (1, 2):
        checkpoint.save_last({"step": step}, tmp_path, ["checkpoint0003.pth"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state = {"w": torch.zeros(1_000_000)}
    room = len(encoded(state)) - missing if missing else 0
    with (
        full_disk(room),
        pytest.raises(InputError, match=r"the checkpoint .* could not be written"),
    ):
        checkpoint.save_last(state, tmp_path, kept_as)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert capfd.readouterr().err == ""
    checkpoint.save_last({"step": 3}, tmp_path, kept_as)
    assert checkpoint.load_file(tmp_path / LAST) == {"step": 3}


def test_a_folder_that_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"could not be written: .*No such file"):
        checkpoint.save({}, tmp_path / "gone" / "checkpoint.pth")


# The last one, the one before, and those that are kept


@pytest.fixture(scope="module")
def whole() -> dict:
    """A run's state at its first step."""
    return checkpoint_of(pretraining(small_config(MODEL__DEPTHS=[1], LOSS__OBJECTIVE="dino")))


def at_step(state: dict, step: int) -> dict:
    return {**state, "step": step, "carried": {"mark": torch.full((1000,), float(step))}}


def steps_in(folder: Path) -> dict[str, int]:
    """The step of every checkpoint that stands under a final name, each of which is intact."""
    found = {path.name: checkpoint.load_own(path) for path in folder.glob("checkpoint*.pth")}
    assert all((state["carried"]["mark"] == state["step"]).all() for state in found.values())
    return {name: state["step"] for name, state in found.items()}


def test_the_one_before_and_the_kept_ones_stay(whole, tmp_path):
    wanted, kept = [], ["checkpoint0001.pth"]
    for step, kept_as in enumerate([[], kept, [], [], [*kept, BEST]], 1):
        checkpoint.save_last(at_step(whole, step), tmp_path, kept_as)
        wanted.append(steps_in(tmp_path))
        assert not list(tmp_path.glob(".*"))
    assert wanted == [
        {LAST: 1},
        {LAST: 2, PREVIOUS: 1, "checkpoint0001.pth": 2},
        {LAST: 3, PREVIOUS: 2, "checkpoint0001.pth": 2},
        {LAST: 4, PREVIOUS: 3, "checkpoint0001.pth": 2},
        {LAST: 5, PREVIOUS: 4, "checkpoint0001.pth": 5, BEST: 5},
    ]
    assert os.path.samefile(tmp_path / LAST, tmp_path / "checkpoint0001.pth")
    assert os.path.samefile(tmp_path / LAST, tmp_path / BEST)
    assert not os.path.samefile(tmp_path / LAST, tmp_path / PREVIOUS)


def test_copies_are_made_where_links_cannot_be(whole, tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        checkpoint.save_last(at_step(whole, step), tmp_path, [f"checkpoint000{step}.pth"])
    assert steps_in(tmp_path) == {
        LAST: 2,
        PREVIOUS: 1,
        "checkpoint0001.pth": 1,
        "checkpoint0002.pth": 2,
    }
    assert not os.path.samefile(tmp_path / LAST, tmp_path / "checkpoint0002.pth")


WRITES = ("open", "os.rename", "os.link", "os.remove", "os.chmod")


def save_and_die(state: dict, folder: Path, kept_as: list[str], at: int) -> bool:
    """save_last in a child that is killed before its `at`-th act on a file; whether it was."""

    def work(told: TextIO) -> None:
        acts = 0

        def kill(event: str, _: tuple) -> None:
            nonlocal acts
            if event in WRITES:
                acts += 1
                if acts == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        checkpoint.save_last(state, folder, kept_as)
        print("survived", file=told)

    with forked(work) as (_, told):
        lines = told.read()
    assert lines in ("", "survived\n")
    return not lines


@pytest.mark.parametrize("kept_as", [[], ["checkpoint0003.pth", BEST]])
def test_killed_before_any_act_on_a_file_it_leaves_as_many_whole_ones(whole, tmp_path, kept_as):
    checkpoint.save_last(at_step(whole, 1), tmp_path)
    checkpoint.save_last(at_step(whole, 2), tmp_path, ["checkpoint0003.pth"])
    step, moments = 3, 0
    while True:
        before, moments = steps_in(tmp_path), moments + 1
        killed = save_and_die(at_step(whole, step), tmp_path, kept_as, moments)
        after = steps_in(tmp_path)
        assert after.keys() >= before.keys()
        assert all(after[name] >= before[name] for name in before)
        path, state, refused = checkpoint.newest_intact(tmp_path)
        assert (path.name, state["step"], refused) == (LAST, after[LAST], [])
        if not killed:
            break
        step += 1
    # Opened, linked, flushed and renamed are at least the new one and the held one.
    assert moments > 10
    assert after == before | {LAST: step, PREVIOUS: before[LAST]} | dict.fromkeys(kept_as, step)
    # What the killed ones had begun is gone.
    assert not list(tmp_path.glob(".*"))


def test_a_writer_that_is_killed_again_and_again_never_leaves_nothing(whole, tmp_path):
    """At random moments, and looked at all the time: the newest is the last announced or later."""
    draw = random.Random(0)
    checkpoint.save_last(at_step(whole, 1), tmp_path)

    def save_forever(told: TextIO) -> None:
        state = checkpoint.newest_intact(tmp_path)[1]
        for step in range(state["step"] + 1, 10**6):
            kept_as = [f"checkpoint{step // 10:04d}.pth"] if step % 10 == 0 else []
            checkpoint.save_last({**at_step(state, step), "w": ballast}, tmp_path, kept_as)
            print(step, file=told)

    ballast = torch.zeros(1_000_000)
    reached = [1]
    for _ in range(10):
        with forked(save_forever) as (child, told):
            announced = int(told.readline())
            until = time.monotonic() + draw.uniform(0, 0.2)
            while time.monotonic() < until:
                path, state, refused = checkpoint.newest_intact(tmp_path)
                assert (path.name, refused) == (LAST, [])
                assert state["step"] >= announced
            os.kill(child, signal.SIGKILL)
            announced = max([announced, *map(int, told.read().split())])
        _, state, _ = checkpoint.newest_intact(tmp_path)
        assert state["step"] in (announced, announced + 1)
        reached.append(steps_in(tmp_path)[LAST])
    assert reached == sorted(set(reached))


# Damage


def encoded(state: dict, **how) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **how)
    return file.getvalue()


def small_state() -> dict:
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 3, generator=draw)
    return {
        "format": checkpoint.FORMAT,
        "step": 7,
        "lr": 0.1,
        "student": {"w": weights, "b": torch.arange(4)},
    }


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    whole, path = encoded(small_state()), tmp_path / "checkpoint.pth"
    path.write_bytes(whole)
    wanted = encoded(checkpoint.load_file(path))
    draw = random.Random(0)
    # Names, sizes and attributes of the records stand in the last third, the directory.
    places = [draw.randrange(8 * len(whole)) for _ in range(300)]
    places += [draw.randrange(5 * len(whole), 8 * len(whole)) for _ in range(500)]
    outcomes = {"refused": 0, "equal": 0}
    for place in places:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            loaded = checkpoint.load_file(path)
        except NotIntact:
            outcomes["refused"] += 1
        else:
            # Bit for bit, types and strides: as both are written again.
            assert encoded(loaded) == wanted, place
            outcomes["equal"] += 1
    assert min(outcomes.values()) > 100


def test_a_flipped_weight_is_told_by_its_record(tmp_path):
    data = bytearray(encoded({"w": torch.zeros(1000)}))
    data[data.index(bytes(2000)) + 1000] ^= 1
    (tmp_path / "w.pth").write_bytes(data)
    reason = r"w\.pth is damaged: its record '\w+/data/0' does not fit its checksum\.$"
    with pytest.raises(NotIntact, match=reason):
        checkpoint.load_file(tmp_path / "w.pth")


def test_a_record_turned_into_a_folder_is_refused(tmp_path):
    """Its bytes and their checksum are as they were, but torch would not read them."""
    data = bytearray(encoded({"w": torch.ones(1000)}))
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"data/0"))
    data[entry + 38] ^= 0x10
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(NotIntact, match="is damaged"):
        checkpoint.load_file(tmp_path / "w.pth")


def test_records_that_overlap_are_refused(tmp_path):
    """A few bytes that many records share: to verify them all would take for ever."""
    path = tmp_path / "w.pth"
    path.write_bytes(encoded({"w": torch.ones(10_000)}))
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.filelist, key=lambda info: info.compress_size)
        archive.filelist.append(largest)
        archive.writestr("more", "")  # so that the directory is written again
    with pytest.raises(NotIntact, match="it is no whole zip file"):
        checkpoint.load_file(path)


def test_files_without_checksums_load(tmp_path):
    """torch's old format, and zip files whose writer was told to leave them out."""
    state = {"w": torch.arange(9.0)}
    old = encoded(state, _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        bare = encoded(state)
    finally:
        torch.serialization.set_crc32_options(True)
    for data in (old, bare):
        (tmp_path / "w.pth").write_bytes(data)
        assert torch.equal(checkpoint.load_file(tmp_path / "w.pth")["w"], state["w"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, zipped):
    whole, path = encoded(small_state(), _use_new_zipfile_serialization=zipped), tmp_path / "c.pth"
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(NotIntact) as caught:
            checkpoint.load_file(path)
        assert "\n" not in str(caught.value)


def a_zip(compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("notes/a.txt", "text " * 100)
    return file.getvalue()


def a_picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "JPEG")
    return file.getvalue()


FOREIGN = {
    "nothing": b"",
    "text": b"epoch,loss\n1,2.5\n" * 30,
    "picture": a_picture(),
    "zip": a_zip(),
    "compressed zip": a_zip(zipfile.ZIP_DEFLATED),
    "another's": encoded({"model": {"w": torch.zeros(3)}}),
    "half of ours": encoded({"format": checkpoint.FORMAT, "step": 3}),
    "no dictionary": encoded([1, 2]),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_one_sentence(tmp_path, kind):
    path = tmp_path / LAST
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(NotIntact) as caught:
        checkpoint.load_own(path)
    assert str(caught.value) == f"{path} {caught.value.reason}."
    assert "\n" not in caught.value.reason


# Finding one to go on from


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """Kept at steps 10 and 20, the previous at 21, the last at 22, the best at 20."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step, kept_as in (
        (10, ["checkpoint0001.pth"]),
        (20, ["checkpoint0002.pth", BEST]),
        (21, []),
        (22, []),
    ):
        checkpoint.save_last(at_step(whole, step), folder, kept_as)
    return folder


KEPT = ("checkpoint0002.pth", "checkpoint0001.pth")


@pytest.mark.parametrize("lost", range(4))
@pytest.mark.parametrize("how", ["damaged", "empty", "foreign", "gone"])
def test_the_newest_intact_one_is_found(folder, lost, how):
    names = [LAST, PREVIOUS, *KEPT]
    for name in names[:lost]:
        if how == "damaged":
            damage(folder / name)
        elif how == "gone":
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(FOREIGN["nothing" if how == "empty" else "another's"])
    path, state, refused = checkpoint.newest_intact(folder)
    assert (path.name, state["step"]) == (names[lost], [22, 21, 20, 10][lost])
    assert [file.name for file, _ in refused] == (names[:lost] if how != "gone" else [])
    words = {"damaged": "is damaged", "empty": "is not a checkpoint", "foreign": "of this project"}
    assert all(words[how] in reason for _, reason in refused)


def test_a_kept_one_newer_than_the_previous_is_preferred(folder, whole):
    """A kill between the kept file and the last one leaves this."""
    checkpoint.save(at_step(whole, 30), folder / "checkpoint0003.pth")
    assert checkpoint.newest_intact(folder)[0].name == LAST
    damage(folder / LAST)
    path, state, refused = checkpoint.newest_intact(folder)
    assert (path.name, state["step"]) == ("checkpoint0003.pth", 30)
    assert [file.name for file, _ in refused] == [LAST]


def test_one_whose_step_is_no_number_is_passed_over(folder, whole):
    checkpoint.save(whole | {"step": "many"}, folder / LAST)
    path, _, [(refused, reason)] = checkpoint.newest_intact(folder)
    assert (path.name, refused.name) == (PREVIOUS, LAST)
    assert reason == "is not a checkpoint of this project"


def test_kept_ones_go_by_their_number(whole, tmp_path):
    for number in (9, 10000, 200):
        checkpoint.save(at_step(whole, number), tmp_path / f"checkpoint{number:04d}.pth")
    (tmp_path / "checkpoint12.pth").write_text("not one of ours by its name")
    assert checkpoint.newest_intact(tmp_path)[1]["step"] == 10000


def test_a_folder_without_any_is_a_fresh_start(tmp_path):
    assert checkpoint.newest_intact(tmp_path) is None
    assert checkpoint.newest_intact(tmp_path / "none") is None
    (tmp_path / f"{LAST}.refused").write_text("x")
    assert checkpoint.newest_intact(tmp_path) is None


def test_none_intact_is_one_sentence_that_names_all_and_changes_nothing(folder):
    for name in (LAST, PREVIOUS, *KEPT):
        damage(folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError) as caught:
        checkpoint.newest_intact(folder)
    line = str(caught.value)
    tried = before.keys() - {BEST}  # which is whole, and not the newest
    assert all(f"{folder / name} is damaged: its record" in line for name in tried)
    assert "another --output_dir" in line
    assert "\n" not in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("number", [checkpoint.FORMAT - 1, checkpoint.FORMAT + 1])
@pytest.mark.parametrize("name", [LAST, PREVIOUS, KEPT[0]])
def test_another_format_is_never_passed_over(folder, whole, name, number):
    checkpoint.save(at_step(whole, 99) | {"format": number}, folder / name)
    if name != LAST:
        damage(folder / LAST)
    with pytest.raises(InputError, match=f"{name} has checkpoint format {number}; this") as caught:
        checkpoint.newest_intact(folder)
    assert not isinstance(caught.value, NotIntact)


def test_one_that_may_not_be_read_is_never_passed_over(folder):
    def look(told: TextIO) -> None:
        if os.geteuid() == 0:  # who may read everything
            os.setgroups([])
            os.setuid(65534)
        with pytest.raises(InputError) as caught:
            checkpoint.newest_intact(open_to_all)
        print(type(caught.value).__name__, caught.value, file=told)

    with tempfile.TemporaryDirectory() as place:
        open_to_all = Path(shutil.copytree(folder, f"{place}/run"))
        for opened in (Path(place), open_to_all):
            opened.chmod(0o755)
        path = open_to_all / LAST
        path.chmod(0)
        with forked(look) as (_, told):
            line = told.read()
    assert line == f"InputError {path} may not be read: check its permissions.\n"


def test_a_refused_file_is_set_aside_and_never_over_another(tmp_path):
    names = []
    for number in range(3):
        (tmp_path / LAST).write_text(str(number))
        names.append(checkpoint.set_aside(tmp_path / LAST).name)
    assert names == [f"{LAST}.refused", f"{LAST}.refused2", f"{LAST}.refused3"]
    assert [(tmp_path / name).read_text() for name in names] == ["0", "1", "2"]
    assert sorted(os.listdir(tmp_path)) == names
    with pytest.raises(InputError, match="could not be set aside"):
        checkpoint.set_aside(tmp_path / LAST)


# What a run writes


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(plain(k) and plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)


def test_a_runs_checkpoint_loads_without_any_allowance_and_rebuilds_the_network(trained):
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    assert plain({k: v for k, v in state.items() if k not in ("student", "teacher")})
    assert set(state) == {
        *("format", "step", "epoch", "images_per_step", "student", "teacher", "optimizer"),
        *("steps_per_epoch", "scaler", "carried", "config", "versions", "model"),
        *("processes", "images", "guard", "window", "watch", "bad_images", "log_lines"),
        "standing",
    }
    assert state["format"] == checkpoint.FORMAT == 3
    assert (state["step"], state["epoch"], state["images_per_step"]) == (8, 4, 8)
    assert state["model"]["backbone"]["arch"] == "vit_small"
    assert state["model"]["backbone"]["depths"] == [2]
    assert state["model"]["heads"]["out_dim"] == 64
    assert state["model"]["pooling"] is True
    assert state["student"]["pool.score.weight"].shape == (1, 8)
    assert state["teacher"].keys() == state["student"].keys()
    assert set(state["carried"]) == {"image", "region"}
    assert state["versions"] == {"torch": torch.__version__}
    stored = config.from_dict(state["config"])
    written = config.defaults()
    config.merge_file(written, trained / "config.yaml")
    assert config.differing(stored, written) == []


def test_every_kept_epoch_has_its_file(trained):
    names = sorted(path.name for path in trained.glob("*.pth"))
    kept = [f"checkpoint{epoch:04d}.pth" for epoch in (1, 2, 3, 4)]
    assert names == [LAST, *kept, PREVIOUS]
    for epoch in (1, 4):
        state = torch.load(trained / f"checkpoint{epoch:04d}.pth", weights_only=True)
        assert (state["epoch"], state["step"]) == (epoch, 2 * epoch)
    assert torch.load(trained / PREVIOUS, weights_only=True)["epoch"] == 3
    assert not list(trained.glob(".*.tmp"))
