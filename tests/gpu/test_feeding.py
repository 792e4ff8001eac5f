"""What arrives on the accelerator is right, however far behind the host it is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from datasets.folder import ImageFolder
from datasets.loader import StepSampler
from engine import build
from tests.datasets.photographs import noise
from tests.runs import small_config
from utils.distributed import ALONE, World

pytestmark = pytest.mark.gpu
STEPS, BATCH = 4, 8
MODES = ["none+workers", "none+device", "ram+device", "device+device"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Images so large that a copy of a batch takes a while."""
    root = tmp_path_factory.mktemp("photographs")
    for n in range(16):
        noise(n, (500 + 20 * (n % 3), 400)).save(root / f"{n:02}.png")
    return root


def keep_busy(device: torch.device) -> None:
    """Give a GPU work for some tens of milliseconds; a CPU, which has no queue, nothing."""
    if device.type == "cuda":
        x = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            x = (x @ x).clamp(-1, 1)


def crops_on(device: torch.device, mode: str, folder: Path, workers: int) -> list[list[Tensor]]:
    """The crops of some steps on the CPU; the host asks for all before it waits for any."""
    cache, crops = mode.split("+")
    options = {"DATA__CACHE": cache, "DATA__CROPS": crops, "DATA__CACHE_SIZE": 0}
    options |= {"AUG__GLOBAL_CROPS_SIZE": 224, "AUG__LOCAL_CROPS_SIZE": 96}
    cfg = small_config(**options, DATA__WORKERS=workers, SEED=5)
    images = ImageFolder(folder)
    feed = build.feed(cfg, images, World(0, 1, device))
    sampler = StepSampler(len(images), BATCH, 0, 1, 1, cfg.SEED, 0, STEPS)
    found = []
    batches = feed.batches(sampler, workers)
    for _ in range(STEPS):
        keep_busy(device)
        found.append(next(batches).data)
    assert next(batches, None) is None
    assert all(crop.device == device for step in found for crop in step)
    return [[crop.cpu() for crop in step] for step in found]


@pytest.mark.parametrize("mode", MODES)
def test_crops_are_the_cpu_s_while_the_device_is_behind(mode, accelerator, photographs):
    """A copy that comes too late, or into memory that is still read, shows as another image."""
    wanted = crops_on(ALONE.device, mode, photographs, 0)
    found = crops_on(accelerator, mode, photographs, 2)
    for step, of_cpu in zip(found, wanted, strict=True):
        for crops, others in zip(step, of_cpu, strict=True):
            # By workers they are the same pixels, normalised by a product or a quotient. Batched
            # ones differ by the rounding of resizes (float16 on a GPU), most at sharp edges.
            most = 1e-6 if mode == "none+workers" else 0.02
            assert (crops - others).abs().mean() < most


def test_a_device_that_has_work_does_not_wait_for_data(accelerator, photographs):
    """The wait is the device's: less than the work that it had when the batch was asked for."""
    if accelerator.type == "cpu":
        pytest.skip("a CPU has no queue of work")
    cfg = small_config(DATA__CROPS="workers", DATA__WORKERS=0)
    images = ImageFolder(photographs)
    feed = build.feed(cfg, images, World(0, 1, accelerator))
    batches = feed.batches(StepSampler(len(images), BATCH, 0, 1, 1, 0, 0, STEPS), 0)
    next(batches)
    torch.cuda.synchronize()
    idle = next(batches).waited.seconds()
    for _ in range(40):
        keep_busy(accelerator)
    busy = next(batches).waited.seconds()
    assert busy < idle / 10
