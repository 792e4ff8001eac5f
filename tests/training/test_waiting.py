"""The share of time that is waited for data, and what a run is told of it."""

import itertools
import json

import pytest

from datasets.ahead import Wait
from engine.training import waiting
from engine.training.loop import train
from engine.training.waiting import STEPS, DataWaits, faster
from tests.processes import found_by_each
from tests.runs import batch_of, pretraining, random_crops, record_of, small_config
from utils.distributed import ALONE, World


def waited(seconds: float) -> Wait:
    return Wait(1.0, 1.0 + seconds)


def share_of(world: World) -> float:
    """What one of several processes is told, of whom the second waits."""
    waits = DataWaits(small_config(), world)
    waits.add(waited(1.5 * world.rank))
    waits.add(waited(0.5))
    return waits.share(10, 8.0)


def test_the_share_is_that_of_the_process_that_waits_most():
    assert share_of(ALONE) == pytest.approx(100 * 0.5 / 8)
    assert found_by_each(2, share_of) == pytest.approx([100 * 2 / 8] * 2)


def test_long_waits_are_said_once_and_not_by_a_burst():
    waits = DataWaits(small_config(DATA__WORKERS=1), ALONE)

    def told(share: float, lines: int) -> list[str | None]:
        """What is said of so many lines that together are STEPS steps."""
        said = []
        for _ in range(lines):
            waits.add(waited(share))
            waits.share(STEPS // lines, 1.0)
            said.append(waits.advice())
        return said

    assert told(0.09, 5) == [None] * 5
    assert told(0.5, 5)[:4] == [None] * 4  # not before so many steps
    waits = DataWaits(small_config(DATA__WORKERS=1), ALONE)
    *before, sentence = told(0.11, 5)
    assert before == [None] * 4
    assert sentence.startswith("11 % of the time the cpu waits for data: ")
    assert told(0.9, 1) == [None]


@pytest.mark.parametrize(
    ("options", "device", "cores", "named", "not_named"),
    [
        # By workers: crops on a GPU only in a new run, and no other place for none kept.
        ({"DATA__CROPS": "workers"}, "cuda", 32,
         ["raise DATA.WORKERS (now 1; processes 2, cores 32)", "a faster disk",
          "a new run can have DATA.CACHE ram (or device) or DATA.CROPS device"], ["set DATA"]),
        ({"DATA__CROPS": "workers"}, "cpu", 4, ["new run can have DATA.CACHE ram, or smaller"],
         ["WORKERS", "CROPS", "device"]),
        # On the device a run may keep its images from now on.
        ({"DATA__CROPS": "device"}, "cuda", 4, ["set DATA.CACHE ram (or device), if the", "disk"],
         ["WORKERS", "CROPS"]),
        ({"DATA__CACHE": "ram"}, "cuda", 8, ["raise DATA.WORKERS", "set DATA.CACHE device"],
         ["disk", "new run", "ram"]),
        ({"DATA__CACHE": "device"}, "cuda", 4, ["give each process more cores"],
         ["disk", "new run", "DATA."]),
        ({"DATA__CACHE": "ram"}, "cpu", 8, ["raise DATA.WORKERS"], ["device", "disk", "cores,"]),
    ],
)  # fmt: skip
def test_only_what_a_run_can_do_is_advised(options, device, cores, named, not_named, monkeypatch):
    monkeypatch.setattr(waiting, "usable_workers", lambda wanted: min(wanted, cores))
    sentence = faster(small_config(**options, DATA__WORKERS=1), device, cores, 2)
    assert [words for words in named if words not in sentence] == []
    assert [words for words in not_named if words in sentence] == []


def test_a_line_says_the_share_and_a_run_is_warned(tmp_path, told, monkeypatch):
    """The first batch, for which loader processes start, counts for nothing."""
    monkeypatch.setattr(waiting, "STEPS", 2)
    run = pretraining(small_config(PRINT_FREQ=1, TRAIN__EPOCHS=1))
    waits = itertools.chain([waited(1e6)], itertools.repeat(waited(0.0), 2), [waited(1e3)])
    batches = (batch_of(random_crops(3, 0))._replace(waited=wait) for wait in waits)
    train(run, record_of(3), batches, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["data_wait"] for line in lines[:3]] == [0.0] * 3
    assert lines[3]["data_wait"] > 100  # of a second or so
    said = set(told.messages)
    assert sum("waiting for data 0 %" in message for message in said) == 3
    assert sum("% of the time the cpu waits for data: " in message for message in said) == 1
