"""Checkpoint files: whole or not there at all, and plain data only."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from utils import checkpoint, config
from utils.errors import InputError

ROOT = Path(__file__).parent.parent


def writer(environment, code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SAVE_FOREVER = """
import sys, torch
from utils import checkpoint
for number in range(1, 10**6):
    checkpoint.save({"number": number, "w": torch.full((4_000_000,), float(number))}, sys.argv[1])
    print(number, flush=True)
"""


def size_of(path: Path) -> int:
    """Bytes, 0 for no file; in one call, for the file may be renamed between two."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_writer_killed_at_any_time_leaves_a_whole_file(tmp_path, environment):
    path = tmp_path / "checkpoint.pth"
    process = writer(environment, SAVE_FOREVER, path)
    done = int(process.stdout.readline())
    # Kill while the next file is being written: its temporary name stands beside the old one.
    deadline = time.monotonic() + 60
    partial = f".{path.name}.*.{process.pid}.tmp"
    while not any(0 < size_of(file) < 12_000_000 for file in tmp_path.glob(partial)):
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    done += len(process.communicate()[0].split())
    assert process.returncode == -signal.SIGKILL
    state = checkpoint.load_file(path)
    assert state["number"] in (done, done + 1)
    assert (state["w"] == state["number"]).all()


SAVE_ON_A_FULL_DISK = """
import resource, sys, torch
from utils import checkpoint
from utils.errors import run_script
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run_script(lambda: checkpoint.save({"w": torch.zeros(1_000_000)}, sys.argv[1]))
"""


@pytest.mark.parametrize("limit", [0, 100, 100_000, 3_999_000])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, environment, limit):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({"number": 1}, path)
    process = writer(environment, SAVE_ON_A_FULL_DISK, path, limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith(f"error: the checkpoint {path} could not be written: ")
    assert checkpoint.load_file(path) == {"number": 1}
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_a_folder_that_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"could not be written: .*No such file"):
        checkpoint.save({}, tmp_path / "gone" / "checkpoint.pth")


def test_a_kept_copy_outlives_the_next_save(tmp_path):
    last, kept = tmp_path / "checkpoint.pth", tmp_path / "checkpoint0001.pth"
    for number in (1, 2):
        checkpoint.save({"number": number}, last)
        if number == 1:
            checkpoint.link_copy(last, kept)
            assert os.path.samefile(last, kept)
    assert checkpoint.load_file(kept) == {"number": 1}
    assert checkpoint.load_file(last) == {"number": 2}
    checkpoint.link_copy(last, kept)
    assert checkpoint.load_file(kept) == {"number": 2}
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth", "checkpoint0001.pth"]


def test_a_copy_is_made_where_links_cannot_be(tmp_path):
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    last, kept = tmp_path / "checkpoint.pth", other / f"{os.getpid()}.checkpoint0001.pth"
    checkpoint.save({"number": 1}, last)
    try:
        checkpoint.link_copy(last, kept)
        assert not os.path.samefile(last, kept)
        assert checkpoint.load_file(kept) == {"number": 1}
    finally:
        kept.unlink(missing_ok=True)


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
        *("steps_per_epoch", "scaler", "centres", "config", "versions", "model"),
    }
    assert state["format"] == checkpoint.FORMAT == 1
    assert (state["step"], state["epoch"], state["images_per_step"]) == (8, 4, 8)
    assert state["model"]["backbone"]["arch"] == "vit_small"
    assert state["model"]["backbone"]["depths"] == [2]
    assert state["model"]["heads"]["out_dim"] == 64
    assert state["model"]["pooling"] is True
    assert state["student"]["pool.score.weight"].shape == (1, 8)
    assert state["teacher"].keys() == state["student"].keys()
    assert torch.equal(state["teacher"]["pool.score.weight"], state["student"]["pool.score.weight"])
    assert set(state["centres"]) == {"image", "region"}
    assert state["versions"] == {"torch": torch.__version__}
    stored = config.from_dict(state["config"])
    written = config.defaults()
    config.merge_file(written, trained / "config.yaml")
    assert config.differing(stored, written) == []


def test_every_kept_epoch_has_its_file(trained):
    names = sorted(path.name for path in trained.glob("*.pth"))
    assert names == ["checkpoint.pth", *(f"checkpoint{epoch:04d}.pth" for epoch in (1, 2, 3, 4))]
    for epoch in (1, 4):
        state = torch.load(trained / f"checkpoint{epoch:04d}.pth", weights_only=True)
        assert (state["epoch"], state["step"]) == (epoch, 2 * epoch)
    assert not list(trained.glob(".*"))
