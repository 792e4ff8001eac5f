"""Crops made on the accelerator beside PIL's and the CPU's; nothing waits for it."""

import pytest
import torch

from datasets import batched
from datasets.batched import Images
from datasets.cache import DecodedImages
from datasets.feed import step_sampler
from datasets.folder import ImageFolder
from datasets.multicrop import Augmentation, MultiCrop
from engine import build
from tests.datasets.test_batched import SIZES, batch, differences, draws, multicrop, picture
from tests.gpu.steps import unwaited
from tests.runs import small_config
from utils.distributed import ALONE, World

pytestmark = pytest.mark.gpu


def test_crops_of_a_batch_are_pils(accelerator, monkeypatch):
    """All operations in their order, within about the grey levels that are allowed on a CPU.

    A rehearsal resizes by products too, but in float32.
    """
    if accelerator.type == "cpu":
        monkeypatch.setattr(batched, "resize_one_by_one", batched.resize_by_products)
    means = differences(multicrop(solarise_prob=0.5), rounds=12, device=accelerator)
    assert means.mean() < 1.7
    assert means.max() < 4


def test_crops_are_the_cpu_s_and_are_made_without_waiting(accelerator):
    crops, images = multicrop(), batch([picture(*size) for size in SIZES])
    drawn = draws(crops, len(SIZES))
    there = Images(images.pixels.to(accelerator), images.sizes)
    crops(there, drawn)
    with unwaited(accelerator):
        found = crops(there, drawn)
    for one, other in zip(found, crops(images, drawn), strict=True):
        assert one.device == accelerator
        # float16 weights, and no rounding to whole grey levels: 1 level is 1/58.
        assert (one.cpu() - other).abs().mean() < 0.5 / 58


@pytest.mark.parametrize("on_device", [False, True], ids=["ram", "device"])
def test_kept_images_are_gathered_without_waiting(accelerator, images, on_device):
    folder, world = ImageFolder(images), World(0, 1, accelerator)
    kept = DecodedImages(folder, 40, world, 0, on_device=on_device)
    order = [5, 0, 3, 3]
    with unwaited(accelerator):
        found = kept.batch(order)
    wanted = DecodedImages(folder, 40, ALONE).batch(order)
    assert found.pixels.device == accelerator
    assert found.sizes == wanted.sizes
    for place, (height, width) in enumerate(wanted.sizes):
        one, other = (each.pixels[place, :, :height, :width].cpu() for each in (found, wanted))
        assert torch.equal(one, other)


WAYS = {
    "workers": {},
    "device": {"DATA__CROPS": "device"},
    "ram": {"DATA__CACHE": "ram"},
    "kept on the device": {"DATA__CACHE": "device"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_feed_brings_its_crops_to_the_device(accelerator, images, way):
    """By a loader process: the crops of the same feed on the CPU."""
    folder, cfg = ImageFolder(images), small_config(**WAYS[way])
    found = []
    for world in (World(0, 1, accelerator), ALONE):
        sampler = step_sampler(folder, 3, 1, world, 0, 0, 2)
        found.append(list(build.feed(cfg, folder, world).batches(sampler, 1)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.indices, other.indices)
        for crops, wanted in zip(one.data, other.data, strict=True):
            assert crops.device == accelerator
            difference = (crops.cpu() - wanted).abs().mean()
            assert difference == 0 if way == "workers" else difference < 0.5 / 58


def test_no_random_state_of_the_device_is_touched(accelerator):
    state = torch.cuda.get_rng_state if accelerator.type == "cuda" else torch.get_rng_state
    before = state()
    MultiCrop(Augmentation(32))(picture(48, 48), 5)
    crops = multicrop()
    there = batch([picture(*size) for size in SIZES])
    crops(Images(there.pixels.to(accelerator), there.sizes), draws(crops, len(SIZES)))
    assert torch.equal(state(), before)
