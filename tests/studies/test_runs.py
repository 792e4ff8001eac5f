"""The runs of a study: folders and signals of real processes, of one line each."""

import sys
from dataclasses import replace

import pytest

from datasets.folder import LabelledImages
from engine.studies.runs import IDENTITY, Run, pretrained, run_of
from engine.studies.spec import load
from tests.studies.studies import PLACES, study_file
from utils import config
from utils.errors import InputError

TRAINS = "import pathlib, sys; pathlib.Path(sys.argv[1], 'checkpoint.pth').touch()"


def line_of(run: Run, line: str) -> Run:
    """The same run with a line of Python for its command; sys.argv[1] is its folder."""
    return replace(run, command=[sys.executable, "-c", line, str(run.folder)])


def codes(*runs: Run) -> list[int]:
    return [code for _, code in pretrained(runs)]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("TRAIN.EPOCHS", 4),
        ("TRAIN.BATCH_SIZE_PER_GPU", 4),
        ("TRAIN.ACCUM_STEPS", 2),
        ("DATA.MAX_BAD", 0.5),
        ("INIT.WEIGHTS", "other.pth"),
    ],
)
def test_a_folder_with_a_run_of_other_options_is_refused(option, value, tmp_path):
    study = load(study_file(tmp_path))
    run = line_of(run_of(study, "cmd", 0, PLACES, tmp_path), TRAINS)
    assert codes(run) == [0]
    changed = run_of(load(study.path, [(option, value)]), "cmd", 0, PLACES, tmp_path)
    was = config.get(study.config("cmd"), option)
    with pytest.raises(InputError) as caught:
        codes(line_of(changed, TRAINS))
    assert "holds a run of another study: " in str(caught.value)
    assert f" {option} (was {was}, now {value})" in str(caught.value)
    assert codes(run) == [0]  # nothing was changed


def test_a_folder_with_a_run_of_other_images_or_of_nobody_knows_what_is_refused(tmp_path):
    study = load(study_file(tmp_path))
    run = line_of(run_of(study, "cmd", 0, PLACES, tmp_path), TRAINS)
    checks = f"import sys, os; sys.exit(not os.path.exists(sys.argv[1] + '/{IDENTITY}'))"
    assert codes(line_of(run, checks)) == [0]  # it stands before the first step
    others = replace(PLACES, train=LabelledImages("/data/train", ["a.png"], [0], ["a"]))
    other = run_of(study, "cmd", 0, others, tmp_path)
    other.refuse_other()  # there is no checkpoint to go on from
    assert codes(run) == [0]
    with pytest.raises(InputError, match=r"seed0 holds a run of another study: images \(was"):
        other.refuse_other()
    with pytest.raises(InputError, match=r"processes \(was 1, now 2\)"):
        run_of(study, "cmd", 0, PLACES, tmp_path, processes=2).refuse_other()
    # Judged otherwise, or by an option that its objective does not read, it is the same run.
    judged = load(study.path, [("LINEAR.C", "3"), ("LCR.WEIGHT", "3")])
    run_of(judged, "cmd", 0, PLACES, tmp_path).refuse_other()
    (run.folder / IDENTITY).unlink()
    with pytest.raises(InputError, match=f"holds a run, but no {IDENTITY} that says"):
        codes(run)
    (run.folder / "checkpoint.pth").unlink()
    assert codes(run) == [0]


def test_children_of_a_study_that_stops_get_sigterm_and_are_waited_for(tmp_path):
    study = load(study_file(tmp_path))
    waits = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    time.sleep(0.3)
    (folder / "checkpoint.pth").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / "ready").touch()
signal.pause()
"""
    ready = tmp_path / "runs/cmd/seed0/ready"
    quick = f"import os, time\nwhile not os.path.exists('{ready}'): time.sleep(0.01)"
    lines = {0: waits, 1: quick}
    runs = [line_of(run_of(study, "cmd", s, PLACES, tmp_path), line) for s, line in lines.items()]
    ended = pretrained(runs, at_once=2)
    assert next(ended)[0] == runs[1]
    assert not (ready.parent / "checkpoint.pth").exists()
    ended.close()
    assert (ready.parent / "checkpoint.pth").exists()


def test_several_processes_are_started_by_torchrun(tmp_path):
    run = run_of(load(study_file(tmp_path)), "cmd", 0, PLACES, tmp_path, processes=3)
    assert run.command[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc_per_node=3" in run.command
