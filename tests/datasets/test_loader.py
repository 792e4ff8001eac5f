"""The loader of a whole run: who sees which images, and what its workers do."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from datasets.folder import ImageFolder
from datasets.loader import (
    BadImage,
    KeyedDataset,
    StepSampler,
    augmented,
    build_loader,
    collate,
    steps_per_epoch,
)
from datasets.multicrop import (
    Augmentation,
    MultiCrop,
)
from tests.datasets.photographs import equal_crops, rng_states, save
from utils.errors import InputError


def sampler(first=0, last=12, *, length=25, batch=2, rank=0, world=1, accumulation=2, seed=0):
    return StepSampler(length, batch, rank, world, accumulation, seed, first, last)


def step_keys(batch: int, world: int, accumulation: int) -> list[set]:
    """The keys of every step of two epochs, all ranks and micro-batches together."""
    steps = [set() for _ in range(6)]
    for rank in range(world):
        batches = list(
            sampler(0, 6, batch=batch, rank=rank, world=world, accumulation=accumulation)
        )
        assert len(batches) == 6 * accumulation
        for i, keys in enumerate(batches):
            assert len(keys) == batch
            assert not steps[i // accumulation] & set(keys)
            steps[i // accumulation] |= set(keys)
    return steps


@pytest.mark.parametrize("layout", [(4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_a_step_has_the_same_images_however_it_is_divided(layout):
    assert step_keys(*layout) == step_keys(8, 1, 1)


def test_an_epoch_is_a_shuffle_without_repeats():
    batches = list(sampler())
    assert len(batches) == len(sampler()) == 24
    epochs = [[key for keys in batches[i : i + 12] for key in keys] for i in (0, 12)]
    orders = [[index for _, index in keys] for keys in epochs]
    for number, (keys, order) in enumerate(zip(epochs, orders, strict=True)):
        assert {epoch for epoch, _ in keys} == {number}
        assert len(set(order)) == 24
        assert set(order) < set(range(25))
        assert order != sorted(order)
    assert orders[0] != orders[1]
    assert list(sampler(seed=1)) != batches


def test_epochs_together_reach_every_image():
    seen = {index for keys in sampler(0, 60) for _, index in keys}
    assert seen == set(range(25))


@pytest.mark.parametrize("first", [1, 5, 6, 8, 12])
def test_a_later_start_gives_the_tail(first):
    assert list(sampler(first)) == list(sampler())[2 * first :]


def test_steps_per_epoch():
    assert steps_per_epoch(25, 2, 3, 2) == 2
    assert steps_per_epoch(24, 2, 3, 4) == 1
    with pytest.raises(InputError) as caught:
        steps_per_epoch(23, 2, 3, 4)
    text = str(caught.value)
    assert "23 images" in text
    assert "24 (batch 2 x 3 processes x 4 accumulated): lower the batch size" in text


@pytest.fixture
def photos(tmp_path) -> Path:
    return save(tmp_path, *[f"{i:02}.png" for i in range(10)])


def run_data(photos: Path, seed: int = 3) -> KeyedDataset:
    crops = MultiCrop(Augmentation(16, (0.4, 1.0), (1, 1), (8, 6)))
    return augmented(ImageFolder(photos), crops, seed)


def run_batches(photos: Path, workers: int, first: int = 0) -> list:
    order = sampler(first, 5, length=10, batch=2)
    return list(build_loader(run_data(photos), order, workers, pin_memory=False))


def assert_equal_batches(left: list, right: list) -> None:
    for (crops, indices, *_), (other_crops, other_indices, *_) in zip(left, right, strict=True):
        assert torch.equal(indices, other_indices)
        assert all(equal_crops(crops, other_crops))


def test_batches_do_not_depend_on_workers_nor_on_the_first_step(photos):
    before = rng_states()
    whole = run_batches(photos, 0)
    crops, indices, *_ = whole[0]
    assert [tuple(c.shape) for c in crops] == [(2, 3, s, s) for s in (16, 16, 8, 6)]
    assert indices.dtype == torch.int64
    assert_equal_batches(run_batches(photos, 1), whole)
    assert_equal_batches(run_batches(photos, 2), whole)
    assert_equal_batches(run_batches(photos, 2, first=3), whole[6:])
    assert rng_states() == before


def test_crops_change_with_epoch_and_seed(photos):
    data = run_data(photos)
    (first, index), (second, _) = data[0, 4], data[1, 4]
    assert index == 4
    assert len(data) == 10
    assert equal_crops(first, second) == [False] * 4
    assert not torch.equal(first[0], run_data(photos, seed=4)[0, 4][0][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_arrives_as_a_marker(photos, workers, capfd):
    (photos / "04.png").write_bytes(b"broken")
    sample = run_data(photos)[0, 4]
    assert sample == BadImage(str(photos / "04.png"), "it is not an image in a known format")
    assert str(sample).startswith(f"the image {photos / '04.png'} cannot be read (it is not")
    assert "\n" not in str(sample)
    batches = run_batches(photos, workers)
    assert {bad for batch in batches for bad in batch.bad} == {sample}
    assert 4 not in torch.cat([batch.indices for batch in batches])
    assert "Traceback" not in capfd.readouterr().err


def test_collate_keeps_what_was_read_and_names_the_rest():
    bad = BadImage("x.jpg", "cut")
    batch = collate([([torch.zeros(3, 4, 4)], 7), bad, ([torch.ones(3, 4, 4)], 2)])
    assert batch.data[0][:, 0, 0, 0].tolist() == [0, 1]
    assert batch.indices.tolist() == [7, 2]
    assert batch.bad == [bad]
    for samples in ([bad], []):
        batch = collate(samples)
        assert batch.data is None
        assert batch.indices.tolist() == []
        assert batch.bad == samples


class Workplace(Dataset):
    """Tells where an item was made: process and number of torch threads."""

    def __getitem__(self, key):
        return [torch.tensor([os.getpid(), torch.get_num_threads()])], key[1]


def test_workers_start_once_a_run_and_have_one_thread():
    batches = list(build_loader(Workplace(), sampler(0, 24), workers=2, pin_memory=False))
    places = torch.cat([batch.data[0] for batch in batches])
    assert len(batches) == 48
    assert len(set(places[:, 0].tolist())) == 2
    assert os.getpid() not in places[:, 0]
    assert set(places[:, 1].tolist()) == {1}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_workers_outlive_a_signal_to_all_processes_of_a_job(number):
    batches = iter(build_loader(Workplace(), sampler(0, 24), workers=2, pin_memory=False))
    first = [next(batches) for _ in range(2)]
    for process in {batch.data[0][0, 0].item() for batch in first}:
        # From elsewhere: what the parent sends is meant for the worker.
        subprocess.run(["kill", f"-{number}", str(process)], check=True)
    assert len(list(batches)) == 46
