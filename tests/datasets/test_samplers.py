"""Any division of a step and any shards: each epoch takes each image once (by hypothesis)."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datasets.loader import EpochSampler, StepSampler, epoch_order, steps_per_epoch
from datasets.shards import ShardOrder
from tests.examples import often, seldom
from utils.distributed import World
from utils.errors import InputError

CPU = torch.device("cpu")


@st.composite
def divisions(draw, images: int) -> tuple[int, int, int]:
    """(world, batch, accumulation) of a product."""
    divisors = [n for n in range(1, images + 1) if images % n == 0]
    world = draw(st.sampled_from(divisors))
    batch = draw(st.sampled_from([n for n in divisors if images // world % n == 0]))
    return world, batch, images // world // batch


def joined(lists: Iterable[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


def steps_of(length, division, seed, first, last, order=None) -> list[list[list[int]]]:
    """The (epoch, image) keys of each step on each rank: [step][rank], micro-batches in a row."""
    world, batch, accumulation = division
    ranks = []
    for rank in range(world):
        sampler = StepSampler(length, batch, rank, world, accumulation, seed, first, last, order)
        micro = list(sampler)
        assert len(micro) == len(sampler)
        assert all(len(keys) == batch for keys in micro)
        ranks.append(
            [joined(micro[i : i + accumulation]) for i in range(0, len(micro), accumulation)]
        )
    return [list(step) for step in zip(*ranks, strict=True)]


@st.composite
def runs(draw) -> tuple:
    """(length, product, division, another division, seed, steps an epoch, epochs)."""
    images = draw(st.integers(1, 24))
    length = draw(st.integers(images, 4 * images + 5))
    divisions_ = [draw(divisions(images)) for _ in range(2)]
    return length, images, *divisions_, draw(st.integers(0, 2**40)), draw(st.integers(1, 3))


@often
@given(runs(), st.data())
def test_every_step_sampler_takes_each_epoch_once_and_resumes_to_the_tail(run, data):
    length, images, division, other, seed, epochs = run
    per_epoch = steps_per_epoch(length, division[1], division[0], division[2])
    assert per_epoch == length // images
    total = per_epoch * epochs
    steps = steps_of(length, division, seed, 0, total)
    assert len(steps) == total
    for epoch in range(epochs):
        keys = joined(joined(steps[epoch * per_epoch : (epoch + 1) * per_epoch]))
        order = epoch_order(length, seed, epoch).tolist()
        assert sorted(order) == list(range(length))
        assert {key[0] for key in keys} == {epoch}
        # Each once, but for the tail that fills no step.
        assert sorted(key[1] for key in keys) == sorted(order[: len(order) - length % images])
    # However it is divided, and wherever it starts.
    first = data.draw(st.integers(0, total))
    tail = steps_of(length, other, seed, first, total)
    assert [joined(step) for step in tail] == [joined(step) for step in steps[first:]]


@seldom
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_too_few_images_for_a_step_are_refused(length, batch, world, accumulation):
    images = batch * world * accumulation
    if length >= images:
        assert steps_per_epoch(length, batch, world, accumulation) == length // images
    else:
        division = f"batch {batch} x {world} processes x {accumulation} accumulated"
        words = f"{length} images but one step takes {images} ({division}): lower"
        with pytest.raises(InputError, match=re.escape(words)):
            steps_per_epoch(length, batch, world, accumulation)


@often
@given(
    indices=st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=60),
    batch=st.integers(1, 70),
    world=st.integers(1, 7),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 2),
)
def test_every_epoch_sampler_takes_each_image_once(indices, batch, world, seed, first):
    ranks = [
        list(EpochSampler(indices, batch, World(rank, world, CPU), seed, first, 3))
        for rank in range(world)
    ]
    per_epoch = -(-len(indices) // batch)
    assert {len(batches) for batches in ranks} == {per_epoch * (3 - first)}
    together = [joined(parts) for parts in zip(*ranks, strict=True)]
    assert together == list(EpochSampler(indices, batch, World(0, 1, CPU), seed, first, 3))
    assert (
        together
        == list(EpochSampler(indices, batch, World(0, 1, CPU), seed, 0, 3))[first * per_epoch :]
    )
    for number, epoch in enumerate(range(first, 3)):
        batches = together[number * per_epoch : (number + 1) * per_epoch]
        assert all(len(keys) == batch for keys in batches[:-1])
        keys = joined(batches)
        assert {key[0] for key in keys} == {epoch}
        assert sorted(key[1] for key in keys) == sorted(indices)
    for parts in zip(*ranks, strict=True):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@often
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    world=st.integers(1, 5),
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 2),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_every_order_of_shards_is_a_permutation_of_spans(
    counts, world, batch, accumulation, seed, epoch
):
    length, step = sum(counts), batch * accumulation
    order = ShardOrder(counts, world, step, seed)
    images = order(epoch).tolist()
    assert images == ShardOrder(counts, world, step, seed)(epoch).tolist()
    assert sorted(images) == list(range(length))
    spans = [span.tolist() for span in order.spans(epoch)]
    assert sorted(joined(spans)) == list(range(length))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1
    # Shards in a row are cut into spans: a span ends in at most two shards of others.
    shard_of = np.repeat(range(len(counts)), counts)
    held = [set(shard_of[span].tolist()) for span in spans]
    sharing = Counter(itertools.chain(*held))
    for mine in held:
        assert sum(sharing[shard] > 1 for shard in mine) <= 2
    # StepSampler gives each rank its own span and nothing else.
    if length >= step * world:
        per_epoch = length // (step * world)
        division = (world, batch, accumulation)
        steps = steps_of(length, division, seed, epoch * per_epoch, (epoch + 1) * per_epoch, order)
        for rank, span in enumerate(spans):
            seen = [image for each in steps for _, image in each[rank]]
            assert seen == span[: len(seen)]


class NarrowOrder(ShardOrder):
    """Shuffled within a window that is small beside the shards."""

    window = 5


@seldom
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 99))
def test_images_of_a_shard_a_window_apart_keep_their_order(counts, world, seed):
    shard_of = np.repeat(range(len(counts)), counts)
    for span in NarrowOrder(counts, world, 1, seed).spans(0):
        for shard in range(len(counts)):
            mine = [image for image in span.tolist() if shard_of[image] == shard]
            highest = itertools.accumulate(mine, max)
            assert all(image > top - 5 for image, top in zip(mine, highest, strict=True))
