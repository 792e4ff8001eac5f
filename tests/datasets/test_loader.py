"""The loader of a whole run: who sees which images, and what its workers do."""

import os
import signal
import subprocess

import pytest
import torch
from torch.utils.data import Dataset

from datasets.folder import ImageFolder
from datasets.loader import (
    BadImage,
    StepSampler,
    augmented,
    build_loader,
    collate,
)
from datasets.multicrop import Augmentation, MultiCrop
from tests.datasets.photographs import equal_crops, rng_states, save


def sampler(first: int, last: int, length: int = 25, seed: int = 0) -> StepSampler:
    """Two micro-batches of two images a step."""
    return StepSampler(length, 2, 0, 1, 2, seed, first, last)


def test_an_epoch_is_a_shuffle_without_repeats():
    spans = [sampler(0, 6), sampler(6, 12), sampler(0, 6, seed=1)]
    orders = [[index for keys in batches for _, index in keys] for batches in spans]
    for order in orders:
        assert len(set(order)) == 24
        assert order != sorted(order)
    assert len({*map(tuple, orders)}) == 3


def test_batches_do_not_depend_on_workers_nor_on_the_first_step(tmp_path):
    images = ImageFolder(save(tmp_path, *[f"{i:02}.png" for i in range(10)]))
    data = augmented(images, MultiCrop(Augmentation(16, (0.4, 1.0), (1, 1), (8, 6))), 3)

    def batches(workers: int, first: int = 0) -> list:
        return list(build_loader(data, sampler(first, 5, length=10), workers, pin_memory=False))

    before = rng_states()
    whole = batches(0)
    assert [tuple(c.shape) for c in whole[0].data] == [(2, 3, s, s) for s in (16, 16, 8, 6)]
    assert whole[0].indices.dtype == torch.int64
    for found, wanted in ((batches(2), whole), (batches(2, first=3), whole[6:])):
        for left, right in zip(found, wanted, strict=True):
            assert torch.equal(left.indices, right.indices)
            assert all(equal_crops(left.data, right.data))
    assert rng_states() == before


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
