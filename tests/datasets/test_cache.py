"""Images kept decoded: what the buffer holds, what runs make of it, and what is refused."""

import contextlib
import io
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.batched import Images
from datasets.cache import DecodedImages, available, gather_padded, refuse_no_room
from datasets.folder import BadImage, ImageFolder, StoredImages, load_image
from datasets.loader import StepSampler, pad
from engine import build
from tests.datasets.photographs import EXIF_TURNED, encoded
from tests.processes import PATIENCE, found_by_each, start_python
from tests.runs import assert_same_run, small_config
from utils import config
from utils.distributed import ALONE, World
from utils.errors import InputError
from utils.logging import logger

CAP = 40


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise, which a JPEG keeps almost as it is."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


# What is kept


@pytest.fixture(scope="module")
def varied(tmp_path_factory) -> ImageFolder:
    """Images of every kind; those whose name has "jpg" are so large that they decode reduced."""
    root = tmp_path_factory.mktemp("varied")
    noise(60, 50).save(root / "plain.png")
    noise(60, 50).save(root / "turned.png", exif=EXIF_TURNED)
    noise(60, 50).convert("L").save(root / "grey.png")
    noise(30, 20).convert("P").save(root / "palette.png", transparency=bytes(range(256)))
    noise(50, 60).convert("RGBA").save(root / "rgba.png")
    noise(1, 1).save(root / "pixel.png")
    noise(3, 2).save(root / "tiny.png")
    noise(2000, 5).save(root / "long.png")
    noise(4, 3000).save(root / "tall.png")
    noise(640, 333).save(root / "large.jpg", quality=95)
    noise(641, 333).save(root / "large_turned.jpg", quality=95, exif=EXIF_TURNED)
    noise(500, 500).save(root / "square.jpg", quality=95, exif=EXIF_TURNED)
    noise(41, 39).convert("CMYK").save(root / "print.tif")
    grey = np.arange(60 * 50, dtype=np.uint16).reshape(50, 60) * 20
    Image.fromarray(grey).save(root / "sixteen.png")
    return ImageFolder(root)


def plainly(path: Path, cap: int) -> np.ndarray:
    """Decoded in full, turned upright, then reduced: [h, w, 3]."""
    image = load_image(path)
    scale = min(1.0, cap / min(image.size), 4 * cap / max(image.size)) if cap else 1.0
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return np.asarray(image if scale == 1 else image.resize(size, Image.Resampling.BICUBIC))


def kept_image(batch: Images, place: int) -> np.ndarray:
    height, width = batch.sizes[place]
    return batch.pixels[place, :, :height, :width].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cap", [CAP, 0])
def test_a_batch_holds_each_image_decoded_and_reduced(varied, cap, workers, monkeypatch):
    monkeypatch.setattr("datasets.loader._INDICES_AT_ONCE", 4)  # so few images have workers
    kept = DecodedImages(varied, cap, ALONE, workers)
    order = [*range(len(varied)), 0, 3]
    batch = kept.batch(order)
    assert batch.pixels.is_contiguous()
    assert batch.pixels.shape[1:] == (3, *torch.tensor(batch.sizes).amax(0))
    for place, index in enumerate(order):
        path = varied.root / varied.paths[index]
        found, wanted = kept_image(batch, place), plainly(path, cap)
        if path.suffix == ".jpg" and cap:
            wanted = np.asarray(load_image(path, cap))
        assert np.array_equal(found, wanted), path
    assert kept.bytes == sum(plainly(varied.root / path, cap).size for path in varied.paths)


@pytest.mark.parametrize("name", ["large.jpg", "large_turned.jpg", "square.jpg"])
def test_a_large_jpeg_is_decoded_reduced_but_looks_the_same(name, varied):
    with Image.open(varied.root / name) as image:
        stored = image.size
        image.draft(None, (2 * CAP, 2 * CAP))
        assert image.size < stored  # or this test shows nothing
    found = load_image(varied.root / name, CAP)
    assert min(found.size) == CAP
    wanted = plainly(varied.root / name, CAP)
    difference = abs(np.asarray(found, int) - wanted)
    assert difference.mean() < 0.5
    assert difference.max() < 8


def test_the_gather_on_a_device_gives_the_same_images(varied):
    """The index arithmetic that accelerators use, here on the CPU."""
    kept = DecodedImages(varied, CAP, ALONE)
    order = [5, 0, 7, 7, 2, 9]
    images = [kept[i] for i in order]
    starts, sizes = kept._starts[order].tolist(), kept.sizes[order].tolist()
    found = gather_padded(kept._pixels, starts, sizes)
    assert found.shape == pad(images)[0].shape
    for place, image in zip(found, images, strict=True):
        assert torch.equal(place[: image.shape[0], : image.shape[1]], image)


class InMemory(StoredImages):
    """Encoded images that are no files, as those of an archive."""

    def __init__(self, encoded: list[bytes]) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def source(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.encoded[index])

    def name(self, index: int) -> str:
        return f"archive:{index}"


def test_images_that_are_no_files_are_kept_too_and_named(varied):
    files = [(varied.root / path).read_bytes() for path in varied.paths]
    kept, other = (DecodedImages(i, CAP, ALONE) for i in (InMemory(files), varied))
    assert all(torch.equal(kept[i], other[i]) for i in range(len(varied)))
    cut = DecodedImages(InMemory([files[0], files[-1][:-200]]), CAP, ALONE)
    assert [(i, bad.path) for i, bad in cut.bad.items()] == [(1, "archive:1")]
    assert "truncated" in cut.bad[1].reason


# Crops


def feed_config(mode: str, images: Path) -> config.Node:
    cache, crops = mode.split("+")
    return small_config(
        DATA__CACHE=cache,
        DATA__CROPS=crops,
        DATA__CACHE_SIZE=CAP,
        DATA__PATH=str(images),
        SEED=5,
    )


def crops_of(cfg: config.Node, world: World, batch: int) -> list[torch.Tensor]:
    """Every crop of six steps, one tensor [6 * batch, 3, S, S] for each view."""
    images = ImageFolder(cfg.DATA.PATH)
    feed = build.feed(cfg, images, world)
    sampler = StepSampler(len(images), batch, world.rank, world.size, 1, cfg.SEED, 0, 6)
    steps = [batch.data for batch in feed.batches(sampler, 0)]
    return [torch.cat(views) for views in zip(*steps, strict=True)]


def test_the_cap_takes_part_in_a_run(varied):
    capped, whole = (feed_config("ram+workers", varied.root) for _ in range(2))
    config.put(whole, "DATA.CACHE_SIZE", 0, "the test")
    assert not torch.equal(crops_of(capped, ALONE, 4)[0], crops_of(whole, ALONE, 4)[0])


# Several processes of one machine


def kept_by(world: World, folder: Path) -> tuple:
    """Mean colours of all images, this process's share of them, and their sizes."""
    kept = DecodedImages(ImageFolder(folder), CAP, world)
    means = [kept[i].float().mean(dim=(0, 1)).tolist() for i in range(len(kept.sizes))]
    return means, list(kept.share), kept.sizes.tolist()


def bad_for(world: World, folder: Path) -> dict[int, BadImage]:
    """What one process knows as bad; the good images must be as they are in the folder."""
    images = ImageFolder(folder)
    kept = DecodedImages(images, CAP, world)
    for i in range(len(images)):
        if i not in kept.bad:
            path = images.root / images.paths[i]
            assert np.array_equal(kept[i].numpy(), plainly(path, CAP))
    return kept.bad


def found_by_one(world: World, root: Path, varied: Path) -> dict:
    """What one of two processes finds in its own folders, red and green, and in `varied`."""
    own = [("red", "whole", "whole"), ("green", "no image", "cut")][world.rank]
    found = {"two machines": kept_by(world, root / own[0])}
    found["bad on a machine"] = [bad_for(world, root / folder) for folder in own[1:]]
    # What torchrun tells the processes of a single machine.
    os.environ |= {"LOCAL_RANK": str(world.rank), "LOCAL_WORLD_SIZE": str(world.size)}
    found["one machine"] = kept_by(world, root / own[0])
    for mode in ("ram+workers", "none+device"):
        found[mode] = crops_of(feed_config(mode, varied), world, 2)
    return found


@pytest.fixture(scope="module")
def pair(varied, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A folder of folders of images, and what each of two gloo processes finds in it."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("red", "green", "whole"):
        (root / name).mkdir()
    # The same names and sizes in two colours, so that it shows who decoded what.
    for i in range(7):
        Image.new("RGB", (20 + i, 30), (255, 0, 0)).save(root / "red" / f"{i}.png")
        Image.new("RGB", (20 + i, 30), (0, 255, 0)).save(root / "green" / f"{i}.png")
    for i in range(4):
        noise(50, 60).save(root / "whole" / f"{i}.png")
    # The last of the four belongs to rank 1.
    contents = (root / "whole" / "3.png").read_bytes()
    for name, broken in (("no image", b"none"), ("cut", contents[:-300])):
        shutil.copytree(root / "whole", root / name)
        (root / name / "3.png").write_bytes(broken)
    return root, found_by_each(2, found_by_one, root, varied.root)


RED, GREEN = [255.0, 0.0, 0.0], [0.0, 255.0, 0.0]


def test_processes_of_a_machine_decode_each_image_once_into_one_buffer(pair):
    first, second = (found["one machine"] for found in pair[1])
    assert first[0] == second[0] == [RED] * 3 + [GREEN] * 4
    assert (first[1], second[1]) == ([0, 1, 2], [3, 4, 5, 6])
    assert first[2] == second[2] == [[30, 20 + i] for i in range(7)]


def test_processes_of_two_machines_decode_all_images_each(pair):
    means = [found["two machines"][0] for found in pair[1]]
    assert means == [[RED] * 7, [GREEN] * 7]


def test_an_image_that_one_machine_cannot_read_is_bad_for_both(pair):
    root, found = pair
    first, second = (each["bad on a machine"] for each in found)
    assert first == second
    for name, bad in zip(("no image", "cut"), first, strict=True):
        assert [(i, image.path) for i, image in bad.items()] == [(3, str(root / name / "3.png"))]


@pytest.mark.parametrize("mode", ["ram+workers", "none+device"])
def test_two_processes_see_the_crops_of_one_with_twice_the_batch(mode, pair, varied):
    whole = crops_of(feed_config(mode, varied.root), ALONE, 4)
    halves = [found[mode] for found in pair[1]]
    for left, right, view in zip(*halves, whole, strict=True):
        # Of each step, rank 0 has the first half. 14 images make 3 steps of 4 an epoch.
        joined = torch.stack([part.unflatten(0, (6, 2)) for part in (left, right)], 1)
        torch.testing.assert_close(joined.flatten(0, 2), view, rtol=0, atol=1e-5)


# Whole runs

RUN = "LOSS.OBJECTIVE cmd TRAIN.EPOCHS 2 SEED 3 PRINT_FREQ 1 CKPT.KEEP_EVERY 1"
MODES = {
    "ram": f"DATA.CACHE ram DATA.CACHE_SIZE {CAP}",
    "device": f"DATA.CACHE device DATA.CACHE_SIZE {CAP} DATA.WORKERS 2",
    "none": f"DATA.CROPS device DATA.CACHE_SIZE {CAP} DATA.WORKERS 2",
}


@pytest.fixture(scope="module")
def in_ram(tmp_path_factory, pretrain) -> Path:
    folder = tmp_path_factory.mktemp("ram") / "run"
    done = pretrain(folder, f"{RUN} {MODES['ram']}")
    assert "16 images, 0.00 GiB, in memory" in done.stdout
    assert "crops made on cpu from images of at most 40 pixels on the shorter" in done.stdout
    return folder


def test_a_run_goes_on_bit_for_bit_with_its_images_kept_elsewhere(in_ram, pretrain, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(in_ram, folder)
    shutil.copy(folder / "checkpoint0001.pth", folder / "checkpoint.pth")
    done = pretrain(folder, f"{RUN} {MODES['none']}")
    assert "at step 2" in done.stdout
    assert_same_run(in_ram, folder)


def test_a_finished_run_decodes_nothing(in_ram, pretrain):
    assert "GiB" not in pretrain(in_ram, f"{RUN} {MODES['ram']}").stdout


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (f"DATA.CACHE none DATA.CACHE_SIZE {CAP + 1} DATA.CROPS device", "_SIZE (was 40, now 41)"),
        ("DATA.CACHE none", "DATA.CACHE (was ram, now none)"),
    ],
)
def test_a_resume_with_other_crops_is_refused(in_ram, refuse, changed, words):
    assert words in refuse(in_ram, f"{RUN} {changed}")


def test_two_processes_with_kept_images_train(pretrain, tmp_path):
    options = f"{RUN} {MODES['ram']} TRAIN.BATCH_SIZE_PER_GPU 4 DATA.WORKERS 1"
    done = pretrain(tmp_path, options, processes=2)
    assert done.stdout.count("16 images, 0.00 GiB, in memory") == 1
    assert (tmp_path / "checkpoint.pth").exists()


# Refusals


def header_of_a_large_image(path: Path) -> None:
    """The beginning of a file whose header speaks of 9000 x 9000 pixels; it holds none."""
    path.write_bytes(encoded(Image.new("1", (9000, 9000)))[:200])


def test_images_that_do_not_fit_are_refused_by_their_headers(caplog, monkeypatch, tmp_path):
    header_of_a_large_image(tmp_path / "0.png")
    for i in range(1, 2 + available() * 3 // 2 // (3 * 9000**2)):
        (tmp_path / f"{i}.png").hardlink_to(tmp_path / "0.png")
    monkeypatch.setattr(logger, "propagate", True)  # as caplog wants it
    with caplog.at_level("INFO", "cmd"), pytest.raises(InputError) as caught:
        DecodedImages(ImageFolder(tmp_path), 0, ALONE)
    assert "GiB of this machine's memory are free: set a smaller DATA.CACHE_SIZE" in str(
        caught.value
    )
    assert "(now none, as 288), or DATA.CACHE none and" in str(caught.value)
    assert "decoding them" not in caplog.text


def test_images_leave_room_for_training_steps(monkeypatch):
    """On the CPU each process of the machine makes steps in the memory where the images are."""
    one = available() // 2
    monkeypatch.setattr("datasets.cache.available", lambda: 2 * one)
    refuse_no_room(2**20, 0, ALONE.device, True, one, 1)
    with pytest.raises(InputError, match=f"training steps about {3 * one / 2**30:.2f}"):
        refuse_no_room(2**20, 0, ALONE.device, True, one, 3)


def test_a_run_whose_steps_have_no_room_beside_its_images_decodes_none(refuse, tmp_path):
    """About 15 MB of activations an image, by two small forwards, and more images than fit."""
    count = 100 + available() // (12 * 2**20)
    (tmp_path / "images").mkdir()
    noise(8, 8).save(tmp_path / "images" / "0.png")
    for n in range(1, count):
        (tmp_path / "images" / f"{n}.png").hardlink_to(tmp_path / "images" / "0.png")
    options = f"DATA.PATH {tmp_path}/images TRAIN.BATCH_SIZE_PER_GPU {count} MOCO.QUEUE 8"
    line = refuse(tmp_path / "run", f"{options} AUG.GLOBAL_CROPS_SIZE 256 DATA.CACHE ram")
    assert "the decoded images take 0.00 GiB and training steps about" in line


def kept_under_a_limit(world: World, folder: Path) -> str:
    """What DecodedImages says where 128 MiB of address space are left."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**27, resource.RLIM_INFINITY))
    try:
        DecodedImages(ImageFolder(folder), 0, ALONE)
    except InputError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    return ""


def test_memory_that_cannot_be_mapped_is_refused(tmp_path):
    """A limit on the address space, which reserving the memory does not count against."""
    header_of_a_large_image(tmp_path / "0.png")
    (sentence,) = found_by_each(1, kept_under_a_limit, tmp_path)
    assert sentence.startswith(
        "DATA.CACHE: 0.23 GiB of memory cannot be had (Cannot allocate memory): set a smaller DATA."
    )


def icns(side: int) -> bytes:
    """An icon whose header says 128 x 128 and whose contents are a PNG of another size."""
    png = encoded(noise(side, side))
    block = b"ic07" + (8 + len(png)).to_bytes(4, "big") + png
    return b"icns" + (8 + len(block)).to_bytes(4, "big") + block


class Growing(InMemory):
    """Images that are replaced by others once their headers have been read."""

    def source(self, index: int) -> io.BytesIO:
        file = super().source(index)
        self.encoded[index] = encoded(noise(50, 70))
        return file


def test_a_header_that_lies_is_an_unreadable_image():
    small = encoded(noise(30, 30))
    for cap, told in ((0, "128 x 128"), (CAP, "40 x 40")):
        kept = DecodedImages(InMemory([small, icns(32), small]), cap, ALONE)
        reason = f"by its header it would have {told} pixels, it has 32 x 32"
        assert kept.bad == {1: BadImage("archive:1", reason)}
        assert np.array_equal(kept[2].numpy(), noise(30, 30))
    with pytest.raises(InputError, match=r"none of the 2 .* 30 x 30 pixels, it has 50 x 70\)"):
        DecodedImages(Growing([small, small]), 0, ALONE)


def test_images_of_which_none_can_be_read_are_refused():
    for broken in (b"no image", encoded(noise(30, 30))[:-300]):
        with pytest.raises(InputError, match=r"none of the 3 images .* archive:0 c"):
            DecodedImages(InMemory([broken] * 3), CAP, ALONE)


# What is left behind


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder whose name a socket's address, of at most 108 bytes, has room for."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("line", ["decoding them", "loss", None])
def test_nothing_is_left_behind_however_the_run_ends(
    line, command, environment, in_ram, tmp_path, short_folder
):
    """Killed while it decodes or while it trains, or (None) at its end."""
    words = command(tmp_path / "run", f"{RUN} {MODES['device']}")
    process = start_python(
        *words, environment={**environment, "TMPDIR": str(short_folder)}, new_session=True
    )
    if line is not None:
        process.wait_for(line)
        if line == "loss":
            assert "decoded images" in Path(f"/proc/{process.pid}/maps").read_text()
        process.kill()
    assert process.wait() == (0 if line is None else -signal.SIGKILL)
    # Loader workers see in a few seconds that they are alone; torch clears up after them.
    deadline = time.monotonic() + PATIENCE
    met = {process.pid}
    while alive := living_processes(process.pid) or list(short_folder.iterdir()):
        met |= set(alive)
        assert time.monotonic() < deadline
        time.sleep(0.2)
    shared = os.listdir("/dev/shm")
    assert not [name for name in shared if any(str(pid) in name.split("_") for pid in met)]
    if line is None:
        assert_same_run(in_ram, tmp_path / "run")


def living_processes(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = status.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(status.parent.name))
    return found
