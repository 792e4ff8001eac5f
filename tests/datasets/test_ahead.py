"""One batch ahead: the order, what is held, and what is taken for waiting."""

import time
import weakref

import pytest
import torch

from datasets.ahead import ahead, transferred
from datasets.folder import ImageFolder
from datasets.loader import KeyedDataset
from engine import build
from tests.datasets.photographs import save
from tests.runs import small_config
from utils.distributed import ALONE


class Item:
    """Something that lasts as long as it is held."""


def test_when_an_item_is_handed_out_the_next_one_has_been_taken_and_no_more():
    taken = []
    items = ahead(taken.append(n) or n for n in range(4))
    assert taken == []
    seen = [(item, len(taken)) for item in items]
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(ahead([])) == []
    assert list(ahead([7])) == [7]


def test_what_is_handed_out_is_not_held():
    alive = []

    def made() -> Item:
        item = Item()
        alive.append(weakref.ref(item))
        return item

    items = ahead(made() for _ in range(3))
    next(items)
    assert [item() is None for item in alive] == [True, False]


def test_on_a_cpu_nothing_is_copied_and_nothing_taken_before_it_is_asked_for():
    taken = []
    items = transferred((taken.append(n) or n for n in range(3)), str, torch.device("cpu"))
    assert (next(items), taken) == ("0", [0])
    assert [*items] == ["1", "2"]


SECONDS = 0.05


def slowly(index: int, seed: int) -> list[torch.Tensor]:
    time.sleep(SECONDS)
    return [torch.zeros(3, 4, 4, dtype=torch.uint8)]


@pytest.mark.parametrize("workers", [0, 1])
def test_waiting_is_the_loader_s_time_and_not_that_of_making_crops(workers, tmp_path, monkeypatch):
    feed = build.feed(small_config(), ImageFolder(save(tmp_path, "0.png")), ALONE)
    feed.dataset.dataset = KeyedDataset(4, 0, slowly)
    crops = feed.crops

    def slow_crops(moved):
        time.sleep(4 * SECONDS)
        return crops(moved)

    monkeypatch.setattr(feed, "crops", slow_crops)
    waits = [b.waited.seconds() for b in feed.batches([[(0, n)] for n in range(4)], workers)]
    assert waits[0] >= SECONDS
    if workers:  # it works while crops are made
        assert min(waits[1:]) < SECONDS
    else:
        assert min(waits) >= SECONDS
        assert sum(waits) < 4 * 4 * SECONDS
