"""The order of an epoch over shards, which keeps each process in its own few."""

import numpy as np
import pytest
import torch

from datasets.loader import StepSampler
from datasets.shards import (
    WINDOW_IMAGES,
    ShardOrder,
)

UNEQUAL = [1, 30, 7, 12, 5, 64, 3]


def order(counts: list[int], world: int = 1, step: int = 1, seed: int = 0) -> ShardOrder:
    return ShardOrder(counts, world, step, seed)


def sampled(
    counts: list[int], world: int, rank: int, first: int = 0, epochs: int = 2
) -> list[list[tuple[int, int]]]:
    """StepSampler's batches of 2, accumulated twice, over a number of epochs."""
    last = sum(counts) // (4 * world) * epochs
    orders = order(counts, world, 4)
    return list(StepSampler(sum(counts), 2, rank, world, 2, 0, first, last, orders))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_is_a_permutation_over_all_processes(world):
    total = sum(UNEQUAL)
    for step in (1, 4, 7):
        assert sorted(order(UNEQUAL, world, step)(3)) == list(range(total))
    keys = [k for rank in range(world) for batch in sampled(UNEQUAL, world, rank) for k in batch]
    assert len(keys) == len(set(keys)) == 2 * (total // (4 * world)) * 4 * world
    assert set(keys) <= {(epoch, index) for epoch in range(2) for index in range(total)}
    spans = order(UNEQUAL, world).spans(0)
    assert {len(span) - total // world for span in spans} <= {0, 1}


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = torch.stack([order(UNEQUAL)(0), order(UNEQUAL)(1), order(UNEQUAL, seed=1)(0)])
    assert len(orders.unique(dim=0)) == 3
    assert torch.equal(order(UNEQUAL)(1), orders[1])


def shard_of(indices: torch.Tensor, counts: list[int]) -> list[int]:
    return np.searchsorted(np.cumsum(counts), np.asarray(indices), side="right").tolist()


def test_each_process_reads_its_own_shards():
    counts, world = [50] * 39 + [20], 4
    for epoch in range(2):
        spans = order(counts, world).spans(epoch)
        touched = [set(shard_of(span, counts)) for span in spans]
        # Spans of a quarter, and at each border between two of them one shard in common.
        assert all(10 <= len(shards) <= 12 for shards in touched)
        assert sum(map(len, touched)) <= 40 + world - 1
        # StepSampler gives each rank its own span.
        for rank, span in enumerate(spans):
            sampler = StepSampler(
                sum(counts), 2, rank, world, 2, 0, 0, 246, order(counts, world, 4)
            )
            mine = [i for keys in sampler for number, i in keys if number == epoch]
            assert mine == span[: len(mine)].tolist()
            assert len(span) - len(mine) < 4


def test_images_are_mixed_within_a_window_of_shards():
    counts = [1000] * 60
    window = order(counts).window
    assert window == WINDOW_IMAGES
    for span in order(counts, world=2).spans(0):
        shards = np.array(shard_of(span, counts))
        open_at_once = [len(set(shards[i : i + 64])) for i in range(0, len(shards) - 64, 64)]
        assert max(open_at_once) <= window // 1000 + 2
        assert np.median(open_at_once) >= window // 1000
        for shard in set(shards):
            places = np.flatnonzero(shards == shard)
            assert np.ptp(places) <= len(places) + window
        # Neighbours of a shard do not stay neighbours.
        assert np.mean(np.abs(np.diff(span.numpy())) == 1) < 0.01
        # Shards follow one another in an order of their own.
        first = list(dict.fromkeys(shards.tolist()))
        assert first != sorted(first)


def test_the_window_holds_four_large_shards():
    counts = [6000] * 8
    shards = np.array(shard_of(order(counts).spans(0)[0], counts))
    assert order(counts).window == 24000
    assert len(set(shards[24000:24200])) >= 4


@pytest.mark.parametrize("first", [1, 7, 15, 16, 20])
def test_a_later_start_gives_the_tail(first):
    for rank in range(2):
        whole = sampled(UNEQUAL, 2, rank)
        assert sampled(UNEQUAL, 2, rank, first) == whole[2 * first :]
