"""Checkpoints written beside the training, and the log, also on a disk that is full."""

import json
import os
import pickle
import signal
import time
from pathlib import Path
from typing import TextIO

import pytest
import torch

from engine.training.saving import Checkpoints, CheckpointWriter, on_host
from tests.disk import forked, full_disk, small_disk
from tests.processes import run_python
from tests.runs import (
    checkpoint_of,
    events_of,
    load,
    pretraining,
    record_of,
    small_config,
    tensors,
)
from utils import checkpoint
from utils.checkpoint import LAST, PREVIOUS
from utils.errors import InputError
from utils.logging import RunLog


def test_a_checkpoint_is_due_after_so_many_minutes(tmp_path, monkeypatch):
    run = pretraining(small_config(CKPT__EVERY_MINUTES=2.0))
    checkpoints, start = Checkpoints(run, record_of(), tmp_path, None), time.monotonic()
    for seconds, due in ((100, False), (130, True)):
        monkeypatch.setattr(time, "monotonic", lambda now=start + seconds: now)
        assert checkpoints.time_is_up() == due
    monkeypatch.undo()
    checkpoints.close()


# The copy


def test_a_copy_stays_as_it_was_while_training_goes_on():
    tensor, numbers = torch.arange(6.0), [1, 2]
    state = {"a": tensor, "b": [tensor[2:4], {"c": numbers}], "d": (1, "x", None)}
    taken = on_host(state)
    tensor.zero_()
    numbers.append(3)
    state["b"].append(4)
    assert torch.equal(taken["a"], torch.arange(6.0))
    assert torch.equal(taken["b"][0], torch.tensor([2.0, 3.0]))
    assert (taken["b"][1], len(taken["b"]), taken["d"]) == ({"c": [1, 2]}, 2, (1, "x", None))


def test_a_runs_copy_is_written_as_the_run_itself_would_be(tmp_path):
    state = checkpoint_of(pretraining(small_config()))
    for name, written in (("itself", state), ("copy", on_host(state))):
        (tmp_path / name).mkdir()
        checkpoint.save(written, tmp_path / name / LAST)
    first, second = (load(tmp_path / name) for name in ("itself", "copy"))
    ours, theirs = tensors(first), tensors(second)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(theirs[name], value)
        assert theirs[name].stride() == value.stride()
    assert first["student"]._metadata == second["student"]._metadata
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    assert [first[name] for name in ("config", "model")] == [second["config"], second["model"]]


# The writer


def test_the_file_holds_the_moment_of_the_call(tmp_path):
    weights = torch.ones(200_000)
    writer = CheckpointWriter(tmp_path)
    for step in range(1, 6):
        writer.save({"step": step, "w": weights}, ["checkpoint0002.pth"] if step == 2 else [])
        weights += 1  # training goes on in place while the file is written
    writer.wait()
    for name, step in ((LAST, 5), (PREVIOUS, 4), ("checkpoint0002.pth", 2)):
        state = checkpoint.load_file(tmp_path / name)
        assert state["step"] == step
        assert (state["w"] == step).all()
    writer.close()
    assert sorted(os.listdir(tmp_path)) == sorted([LAST, PREVIOUS, "checkpoint0002.pth"])


def test_the_call_returns_before_the_file_is_written_and_the_next_one_waits(tmp_path):
    weights = torch.ones(50_000_000)
    writer = CheckpointWriter(tmp_path)
    writer.save({"step": 1, "w": weights})
    assert not (tmp_path / LAST).exists()
    writer.save({"step": 2, "w": weights[:10]})
    assert (tmp_path / LAST).stat().st_size > 200_000_000 or (tmp_path / PREVIOUS).exists()
    writer.wait()
    assert checkpoint.load_file(tmp_path / LAST)["step"] == 2
    assert checkpoint.load_file(tmp_path / PREVIOUS)["step"] == 1


def until_written(writer: CheckpointWriter) -> None:
    """Without asking for the result, which would raise the error."""
    while writer.busy:
        time.sleep(0.01)


@pytest.mark.parametrize("kept_as", [[], ["checkpoint0001.pth"]])
def test_a_full_disk_stops_the_run_at_the_next_call(tmp_path, told, kept_as):
    with small_disk(tmp_path / "disk", 4_000_000) as fill:
        folder = tmp_path / "disk"
        checkpoint.save_last({"step": 1}, folder)
        checkpoint.save_last({"step": 2}, folder)
        writer = CheckpointWriter(folder)
        with fill(leaving=100_000):
            writer.save({"step": 3, "w": torch.zeros(100_000)}, kept_as)
            until_written(writer)
            assert writer.failed
            with pytest.raises(InputError, match=r"the checkpoint .* could not be written"):
                writer.save({"step": 4}, kept_as)
            assert not writer.failed
        writer.wait()
        assert sorted(os.listdir(folder)) == [LAST, PREVIOUS]
        assert checkpoint.load_file(folder / LAST) == {"step": 2}
        assert checkpoint.load_file(folder / PREVIOUS) == {"step": 1}
        with fill(leaving=100_000):
            writer.save({"step": 3, "w": torch.zeros(100_000)}, kept_as)
            with pytest.raises(InputError, match=r"could not be written"):
                writer.wait()
        writer.close()
    assert not told.records


def test_a_failure_that_nobody_asked_for_is_told_at_the_end(tmp_path, told):
    writer = CheckpointWriter(tmp_path / "none")
    writer.save({"step": 1})
    writer.close()
    (line,) = told.records
    assert line.levelname == "WARNING"
    sentence = f"the checkpoint {tmp_path}/none/{LAST} could not be written"
    assert line.getMessage().startswith(sentence)


def test_an_error_of_ours_is_no_warning(tmp_path, told):
    writer = CheckpointWriter(tmp_path)
    writer.save({"step": 1, "not plain": lambda: None})
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        writer.save({"step": 2})
    assert (told.messages, os.listdir(tmp_path)) == ([], [])


def test_the_process_ending_at_once_leaves_the_old_file(tmp_path):
    """By os._exit, as where several processes end, while the next one is being written."""
    checkpoint.save_last({"step": 1}, tmp_path)

    def work(told: TextIO) -> None:
        writer = CheckpointWriter(tmp_path)
        writer.save({"step": 2, "w": torch.ones(50_000_000)})
        while not any(file.stat().st_size for file in tmp_path.glob(f".{LAST}.*")):
            time.sleep(0.001)
        print("begun", file=told)

    with forked(work) as (_, told):
        assert told.read() == "begun\n"
    assert checkpoint.load_file(tmp_path / LAST) == {"step": 1}


END_EARLY = """
import sys, torch
from pathlib import Path
from engine.training.saving import CheckpointWriter
from utils.errors import InputError, run_script
def main():
    CheckpointWriter(Path(sys.argv[1])).save({"step": 1, "w": torch.ones(20_000_000)})
    raise InputError("something else is wrong.")
run_script(main)
"""


def test_a_process_that_ends_by_an_error_finishes_the_file_first(tmp_path, environment):
    done = run_python("-c", END_EARLY, tmp_path, environment=environment, code=2)
    assert done.stderr == "error: something else is wrong.\n"
    assert checkpoint.load_file(tmp_path / LAST)["step"] == 1
    assert os.listdir(tmp_path) == [LAST]


# The log


def lines_of(folder: Path) -> list[int]:
    """The steps of log.txt; every line must be whole."""
    text = (folder / "log.txt").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_a_log_on_a_full_disk_stops_the_run_and_has_no_torn_line(tmp_path, told):
    log = RunLog(tmp_path, 0, 0)
    log.write(1, {"loss": 1.0})
    size = (tmp_path / "log.txt").stat().st_size
    with (
        full_disk(size + 10),
        pytest.raises(InputError, match=r"the log .*/log.txt cannot be written \(File too large"),
    ):
        log.write(2, {"loss": 2.0})
    assert lines_of(tmp_path) == [1]
    log.close()
    assert not told.records


def test_a_log_whose_end_a_power_cut_tore_goes_on_after_the_lines_of_its_checkpoint(tmp_path):
    whole = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3))
    (tmp_path / "log.txt").write_bytes(whole.encode() + b'{"step": 4, \xff\0\0')
    log = RunLog(tmp_path, 3, 3)
    log.write(4, {"loss": 1.0})
    log.close()
    assert lines_of(tmp_path) == [1, 2, 3, 4]


def test_tensorboard_forgets_what_lies_beyond_the_checkpoint(tmp_path):
    for last, first in ((5, 0), (6, 3)):
        log = RunLog(tmp_path, first, first)
        for step in range(first + 1, last + 1):
            log.write(step, {"loss": 1.0})
        log.close()
    assert lines_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert events_of(tmp_path)["loss"] == [1, 2, 3, 4, 5, 6]


def test_every_line_and_event_is_with_the_system_when_write_returns(tmp_path):
    """A process that is killed loses none."""

    def work(told: TextIO) -> None:
        log = RunLog(tmp_path, 0, 0)
        for step in range(1, 6):
            log.write(step, {"loss": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)

    with forked(work) as (_, told):
        assert told.read() == ""
    assert lines_of(tmp_path) == events_of(tmp_path)["loss"] == [1, 2, 3, 4, 5]
