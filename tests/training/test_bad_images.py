"""Bad and odd image files: which are used and how, what takes a bad one's place, what is told."""

import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.feed import WorkerCrops
from datasets.folder import BadImage, ImageFolder, StoredImages, UnreadableImage, load_image
from datasets.loader import Batch, KeyedDataset, StepSampler, augmented, build_loader
from datasets.multicrop import Augmentation, MultiCrop, sample_seed
from datasets.shards import ImageShards
from datasets.substitutes import TRIES, FullBatches, candidates
from engine import build
from engine.training.bad_images import LIST, BadImages
from tests.conftest import ROOT, save_images
from tests.datasets.photographs import raw_png
from tests.processes import found_by_each, run_python
from tests.runs import assert_same_run, log_of, small_config
from utils.distributed import ALONE, World
from utils.errors import InputError

WIDTH, HEIGHT = 60, 50


def smooth(seed: int = 0) -> np.ndarray:
    """Smooth noise, which a JPEG keeps almost as it is: uint8 [HEIGHT, WIDTH, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def tiles(seed: int = 0) -> np.ndarray:
    """Four colours, which a palette keeps as they are: uint8 [HEIGHT, WIDTH, 3]."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (4, 3), dtype=np.uint8)[draw.integers(0, 4, (HEIGHT, WIDTH))]


def black(side: int) -> bytes:
    """A black PNG of one bit a pixel and side x side pixels."""
    return raw_png(side, side, 1, 0, (bytes(-(-side // 8)) for _ in range(side)))


# Odd images that are used


def palette(transparent: object = None) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        image = Image.fromarray(tiles()).quantize(4)
        image.save(path, **({} if transparent is None else {"transparency": transparent}))
        return tiles()

    return write


def with_alpha(mode: str) -> Callable[[Path], np.ndarray]:
    """RGBA or LA, whose transparency is dropped."""

    def write(path: Path) -> np.ndarray:
        colours = Image.fromarray(smooth()).convert(mode[:-1])
        alpha = Image.fromarray(smooth(1)).convert("L")
        Image.merge(mode, [*colours.split(), alpha]).save(path)
        return np.asarray(colours.convert("RGB"))

    return write


def animated(path: Path) -> np.ndarray:
    """The second frame is of other colours."""
    first, second = Image.fromarray(tiles()), Image.fromarray(tiles(1))
    how = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=[second], duration=100, **how)
    with Image.open(path) as image:
        assert image.n_frames == 2
    return tiles()


def grey16(path: Path) -> np.ndarray:
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 21
    Image.fromarray(values).save(path)
    return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)


def rgb16(path: Path) -> np.ndarray:
    values = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint16).reshape(HEIGHT, WIDTH, 3) * 7
    path.write_bytes(raw_png(WIDTH, HEIGHT, 16, 2, (row.astype(">u2").tobytes() for row in values)))
    return (values >> 8).astype(np.uint8)


def grey(path: Path) -> np.ndarray:
    image = Image.fromarray(smooth()).convert("L")
    image.save(path, quality=95)
    return np.asarray(image.convert("RGB"))


def plain(mode: str = "RGB", kind: str = "", **how) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        Image.fromarray(smooth()).convert(mode).save(path, kind or None, **how)
        return smooth()

    return write


def one_pixel(path: Path) -> np.ndarray:
    Image.new("RGB", (1, 1), (9, 8, 7)).save(path)
    return np.array([[[9, 8, 7]]], np.uint8)


ODD = {
    "a PNG.jpg": plain(kind="PNG"),
    "a JPEG.png": plain(kind="JPEG", quality=95),
    "cmyk.jpg": plain("CMYK", quality=95),
    "cmyk.tif": plain("CMYK"),
    "palette.png": palette(),
    "palette, one colour transparent.png": palette(0),
    "palette, transparency.png": palette(bytes([0, 255, 128, 64])),
    "palette.gif": palette(0),
    "rgba.png": with_alpha("RGBA"),
    "rgba.tif": with_alpha("RGBA"),
    "la.png": with_alpha("LA"),
    "16 bits, grey.png": grey16,
    "16 bits, grey.tif": grey16,
    "16 bits, rgb.png": rgb16,
    "grey.jpg": grey,
    "animated.gif": animated,
    "animated.webp": animated,
    "animated.png": animated,
    "damaged EXIF.png": plain(exif=b"Exif\0\0no EXIF data"),
    "damaged EXIF.jpg": plain(quality=95, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1\2"),
    "1x1.png": one_pixel,
}


def assert_near(found: np.ndarray, wanted: np.ndarray, path: Path) -> None:
    """Equal, but for what a JPEG loses and for rounding 16 bits to 8."""
    assert found.shape == wanted.shape, path
    difference = abs(found.astype(int) - wanted)
    lossy = "JPEG" in path.name or (path.suffix == ".jpg" and "PNG" not in path.name)
    assert difference.mean() < (3 if lossy else 0.5), path
    assert difference.max() <= (30 if lossy else 1 if "16" in path.name else 0), path


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_used_with_its_own_pixels(name, tmp_path):
    wanted = ODD[name](tmp_path / name)
    assert_near(np.asarray(load_image(tmp_path / name)), wanted, tmp_path / name)
    crops = small_crops()
    batch = FullBatches(augmented(ImageFolder(tmp_path), crops, 0)).__getitems__([(0, 0)])
    assert [tuple(view.shape) for view in batch[0][0]] == [(3, s, s) for s in (16, 16, 8)]
    assert all(view.isfinite().all() for view in batch[0][0])


# What EXIF calls an orientation: how the upright image was turned before it was stored.
STORED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image),
    7: lambda image: image.swapaxes(0, 1)[::-1, ::-1],
    8: lambda image: np.rot90(image, -1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_upright(orientation, suffix, tmp_path):
    path, exif = tmp_path / f"x.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](smooth())))
    stored.save(path, exif=exif, **{"lossless": True} if suffix == "webp" else {"quality": 95})
    assert_near(np.asarray(load_image(path)), smooth(), path)


# Bad files


def cut(path: Path) -> None:
    Image.fromarray(smooth()).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-600])


BAD = {
    "empty.jpg": (lambda path: path.touch(), "the file is empty"),
    "cut.jpg": (cut, "image file is truncated"),
    "cut.png": (cut, "image file is truncated"),
    "page.jpg": (
        lambda path: path.write_text("<!DOCTYPE html><html><body>404</body></html>"),
        "it is not an image in a known format",
    ),
    "bomb.png": (
        lambda path: path.write_bytes(black(30_000)),
        "Image size (900000000 pixels) exceeds limit of 178956970 pixels",
    ),
    "nowhere.jpg": (lambda path: path.symlink_to("none"), "No such file or directory"),
    "itself.jpg": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "pipe.jpg": (os.mkfifo, "it is not a file"),
}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    """A bad file of every kind, in alphabetic order, and after them 12 good images."""
    root = tmp_path_factory.mktemp("spoiled")
    for name, (write, _) in BAD.items():
        write(root / name)
    save_images(root / "x.jpg", 12, 0)  # a folder with an image's name
    (root / "z_loop").symlink_to(root)
    (root / "z_loop_of_a_link").symlink_to("z_loop_of_a_link")
    return root


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_tells_its_path_and_reason(name, spoiled):
    with pytest.raises(UnreadableImage) as caught:
        load_image(spoiled / name)
    assert caught.value.bad.path == str(spoiled / name)
    assert caught.value.bad.reason.startswith(BAD[name][1])
    assert "\n" not in str(caught.value)


def test_a_folder_lists_bad_files_and_follows_folders_but_not_loops(spoiled):
    images = ImageFolder(spoiled)
    assert images.paths == [*sorted(BAD), *(f"x.jpg/{i:02d}.png" for i in range(12))]
    reason = "a folder that cannot be listed: Too many levels of symbolic links"
    assert images.unlisted == [BadImage(str(spoiled / "z_loop_of_a_link"), reason)]


def small_crops() -> MultiCrop:
    return MultiCrop(Augmentation(16, local_crops_number=(1,), local_crops_size=(8,)))


def batches_of(
    images: StoredImages, workers: int = 0, first: int = 0, batch: int = 6, last: int = 8
) -> list[Batch]:
    dataset = FullBatches(augmented(images, small_crops(), 3))
    sampler = StepSampler(len(images), batch, 0, 1, 1, 3, first, last)
    return list(build_loader(dataset, sampler, workers, pin_memory=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_bad_file_is_met_without_a_word_from_a_worker(workers, spoiled, capfd):
    batches = batches_of(ImageFolder(spoiled), workers)
    assert all(len(batch.indices.unique()) == 6 for batch in batches)
    assert all(batch.indices.min() >= len(BAD) for batch in batches)
    met = {Path(bad.path).name for batch in batches for bad in batch.bad}
    assert met == set(BAD)
    assert capfd.readouterr().err == ""


VERY_LARGE = """
import sys
from datasets.folder import load_image
image = load_image(sys.argv[1], 40)
print(image.size, image.getextrema())
"""


def test_a_very_large_image_is_used_without_a_warning(tmp_path):
    """PIL warns, by its own lines of code, from 89 million pixels on."""
    (tmp_path / "large.png").write_bytes(black(9_500))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    done = run_python("-c", VERY_LARGE, tmp_path / "large.png", environment=environment)
    assert done.stdout == "(40, 40) ((0, 0), (0, 0), (0, 0))\n"
    assert done.stderr == ""


UNPRIVILEGED = """
import json, os, sys
from datasets.folder import ImageFolder
from tests.training.test_bad_images import batches_of

workers = int(sys.argv[2])
# The same once before, so that nothing is left to be imported without root's rights.
batches_of(ImageFolder(sys.argv[1] + "/open"), workers, batch=4, last=1)
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
images = ImageFolder(sys.argv[1])
batches = batches_of(images, workers, batch=4, last=6)
print(json.dumps({
    "paths": [*images.paths],
    "indices": [batch.indices.tolist() for batch in batches],
    "bad": sorted({(bad.path, bad.reason) for batch in batches for bad in batch.bad}),
    "unlisted": sorted((bad.path, bad.reason) for bad in images.unlisted),
}))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_what_may_not_be_read_is_left_out(workers):
    """In a process without root's rights, in a folder that it may enter."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        save_images(root / "open", 9, 0)
        save_images(root / "locked", 3, 1)
        save_images(root / "inner" / "below", 3, 1)
        (root / "link").symlink_to(root / "inner" / "below")
        (root / "open" / "04.png").chmod(0)
        root.chmod(0o755)
        try:
            (root / "locked").chmod(0)
            (root / "inner").chmod(0o444)
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            done = run_python("-c", UNPRIVILEGED, root, workers, environment=environment)
        finally:
            (root / "locked").chmod(0o755)
            (root / "inner").chmod(0o755)
    found = json.loads(done.stdout)
    assert found["paths"] == [f"open/{i:02d}.png" for i in range(9)]
    assert found["bad"] == [[str(root / "open" / "04.png"), "Permission denied"]]
    reason = "a folder that cannot be listed: Permission denied"
    assert found["unlisted"] == [
        [str(root / name), reason] for name in ("inner/below", "link", "locked")
    ]
    assert all(len(set(batch)) == 4 and 4 not in batch for batch in found["indices"])


# Substitutes

SPOILED = {3, 7, 8, 20}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[ImageFolder, ImageFolder]:
    """24 images, and the same of which four are bad."""
    root = tmp_path_factory.mktemp("sets")
    save_images(root / "whole", 24, 0)
    shutil.copytree(root / "whole", root / "broken")
    for index in SPOILED:
        (root / "broken" / f"{index:02d}.png").write_bytes(b"broken")
    return ImageFolder(root / "whole"), ImageFolder(root / "broken")


def assert_equal_batches(left: list[Batch], right: list[Batch]) -> None:
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert one.bad == other.bad
        assert all(torch.equal(a, b) for a, b in zip(one.data, other.data, strict=True))


def test_a_bad_image_is_replaced_and_nothing_else_changes(sets):
    """By the rule written out once more, from the keys alone."""
    whole, broken = sets
    keys = list(StepSampler(24, 6, 0, 1, 1, 3, 0, 8))
    replaced = 0
    for batch, clean, of_batch in zip(batches_of(broken), batches_of(whole), keys, strict=True):
        taken = [index for _, index in of_batch]
        met = [index for index in taken if index in SPOILED]
        for place, key in enumerate(of_batch):
            index = key[1]
            if index in SPOILED:
                asked = [i for i in candidates(24, 3, key) if i not in taken]
                index = next(i for i in asked if i not in SPOILED)
                met += asked[: asked.index(index)]
                taken.append(index)
                wanted = small_crops()(broken.load(index), sample_seed(3, *key))
                replaced += 1
            else:
                wanted = [view[place] for view in clean.data]
            assert batch.indices[place] == index
            found = [view[place] for view in batch.data]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert len(batch.indices.unique()) == 6
        assert [bad.path for bad in batch.bad] == [
            str(broken.root / broken.paths[index]) for index in dict.fromkeys(met)
        ]
    assert replaced == 2 * len(SPOILED)  # two epochs
    assert any(len(batch.bad) > 1 for batch in batches_of(broken))


def test_substitutes_depend_neither_on_workers_nor_on_the_first_step(sets):
    whole = batches_of(sets[1])
    assert_equal_batches(batches_of(sets[1], 2), whole)
    assert_equal_batches(batches_of(sets[1], 2, first=3), whole[3:])
    assert_equal_batches(batches_of(sets[1], 0, first=5), whole[5:])


def test_without_bad_images_nothing_changes(sets):
    dataset = augmented(sets[0], small_crops(), 3)
    sampler = StepSampler(24, 6, 0, 1, 1, 3, 0, 8)
    plainly = list(build_loader(dataset, sampler, 0, pin_memory=False))
    assert_equal_batches(batches_of(sets[0]), plainly)


def test_candidates_are_a_shuffle_of_their_own_for_each_key():
    orders = [list(candidates(50, *key)) for key in [(0, (0, 1)), (0, (1, 0)), (1, (0, 1))]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    first = candidates(1_000_000, 0, (2, 5))
    assert [next(first) for _ in range(4)] == [978916, 503754, 456127, 496363]
    counts = np.bincount([next(candidates(10, 0, (0, i))) for i in range(2000)], minlength=10)
    assert counts.min() > 140
    assert counts.max() < 260


class Broken(KeyedDataset):
    """Numbers of which only `good` can be read; keeps which were tried."""

    def __init__(self, length: int, good: set[int]) -> None:
        super().__init__(length, 0, self.numbered)
        self.good, self.tried = good, []

    def numbered(self, index: int, seed: int) -> torch.Tensor:
        self.tried.append(index)
        if index not in self.good:
            raise UnreadableImage(f"{index}", "bad")
        return torch.tensor(index)


@pytest.mark.parametrize(("length", "good", "tried"), [(9, 4, 9), (5000, 4, 4 + 1 + TRIES)])
def test_a_batch_that_cannot_be_filled_is_refused_in_the_main_process(length, good, tried, sets):
    """The worker brings the batch without data; the feed refuses it."""
    dataset = Broken(length, set(range(good)))
    keys = [(0, index) for index in range(5)]
    samples = FullBatches(dataset).__getitems__(keys)
    assert len(dataset.tried) == len(set(dataset.tried)) == tried
    assert all(isinstance(sample, BadImage) for sample in samples)
    for workers in (0, 1):
        (batch,) = build_loader(FullBatches(dataset), [keys], workers, pin_memory=False)
        assert batch.data is None
        assert batch.bad == samples
        feed = WorkerCrops(sets[0], Augmentation(), 0, ALONE)
        feed.dataset = FullBatches(dataset)
        with pytest.raises(InputError, match=r"a batch cannot be filled.* image 4 cannot be read"):
            next(feed.batches([keys], workers))


def test_a_broken_member_of_a_shard_is_replaced(sets, tmp_path):
    with tarfile.open(tmp_path / "t-0.tar", "w") as tar:
        for path in sets[1].paths:
            tar.add(sets[1].root / path, path)
    for found, wanted in zip(
        batches_of(ImageShards(tmp_path), 2), batches_of(sets[1]), strict=True
    ):
        assert torch.equal(found.indices, wanted.indices)
        assert all(torch.equal(a, b) for a, b in zip(found.data, wanted.data, strict=True))
        names = [Path(bad.path).name for bad in wanted.bad]
        assert [bad.path for bad in found.bad] == [f"{tmp_path}/t-0.tar:{name}" for name in names]


# Kept images

MODES = ["none+device", "ram+workers", "device+workers"]


def fed(
    world: World, mode: str, folder: Path, workers: int, batch: int
) -> tuple[list[Batch], list[BadImage]]:
    """What six steps of a run are made of, and the bad images that are known before."""
    cache, crops = mode.split("+")
    kept = {"DATA__CACHE": cache, "DATA__CROPS": crops, "DATA__CACHE_SIZE": 40}
    cfg = small_config(**kept, DATA__WORKERS=workers, SEED=3)
    images = ImageFolder(folder)
    feed = build.feed(cfg, images, world)
    sampler = StepSampler(len(images), batch, world.rank, world.size, 1, 3, 0, 6)
    return list(feed.batches(sampler, workers)), feed.bad


@pytest.mark.parametrize(("mode", "workers"), [(mode, n) for mode in MODES for n in (0, 2)])
def test_substitutes_are_the_same_wherever_images_are_kept(mode, workers, spoiled):
    wanted, _ = fed(ALONE, "none+device", spoiled, 0, 6)
    found, before = fed(ALONE, mode, spoiled, workers, 6)
    assert_equal_batches(found, wanted)
    assert any(batch.bad for batch in wanted)
    known = {Path(bad.path).name for bad in before}
    assert known == {"z_loop_of_a_link", *(() if mode == "none+device" else BAD)}


def fed_everywhere(world: World, folder: Path) -> dict[str, tuple]:
    # What torchrun tells the processes of a single machine.
    os.environ |= {"LOCAL_RANK": str(world.rank), "LOCAL_WORLD_SIZE": str(world.size)}
    return {mode: fed(world, mode, folder, 0, 4) for mode in MODES}


def test_two_processes_know_the_same_bad_images_and_substitute_alike(spoiled):
    pair = found_by_each(2, fed_everywhere, spoiled)
    for mine in pair:
        for mode in MODES:
            assert_equal_batches(mine[mode][0], mine["none+device"][0])
            assert mine[mode][1] == pair[0][mode][1]
    batches = [batch for mine in pair for batch in mine["ram+workers"][0]]
    assert all(len(batch.indices.unique()) == 4 for batch in batches)


# What a run tells


def bad(*names: str) -> list[BadImage]:
    return [BadImage(f"/data/{name}.jpg", f"reason {name}") for name in names]


def listed(folder: Path) -> dict:
    return json.loads((folder / LIST).read_text())


def test_each_bad_image_is_told_once_and_listed(tmp_path, caplog):
    images = BadImages(200, 0.02)
    images.exchange(tmp_path)
    assert not (tmp_path / LIST).exists()
    images.note(bad("b", "a", "b"))
    assert images.pending == 2
    assert images.known == {}
    with caplog.at_level("WARNING", "cmd"):
        images.exchange(tmp_path)
        images.note(bad("a", "c"))
        assert images.pending == 1
        images.exchange(tmp_path)
    assert images.pending == 0
    assert [line.message.split(" ")[0] for line in caplog.records] == [
        f"/data/{name}.jpg" for name in "abc"
    ]
    assert caplog.records[0].message == (
        "/data/a.jpg cannot be read (reason a): repair it or remove it; until then other images "
        "take its place"
    )
    assert list(images.known.items()) == [(f"/data/{n}.jpg", f"reason {n}") for n in "abc"]
    entries = [{"path": f"/data/{n}.jpg", "reason": f"reason {n}"} for n in "abc"]
    assert listed(tmp_path) == {"images": 200, "count": 3, "bad": entries}


def test_more_than_the_share_stop_and_name_the_list(tmp_path):
    images = BadImages(200, 0.01)
    images.note(bad("b", "a"))
    images.exchange(tmp_path)
    images.note(bad("a", "c"))
    with pytest.raises(InputError) as caught:
        images.exchange(tmp_path)
    assert str(caught.value) == (
        f"3 of 200 images cannot be read, more than DATA.MAX_BAD 0.01 allows: {tmp_path / LIST} "
        "lists them, for instance /data/a.jpg (reason a); repair or remove them (a "
        "resume on them takes --resume force), or raise DATA.MAX_BAD."
    )
    assert listed(tmp_path)["count"] == 3


def test_all_bad_stop_whatever_the_share(tmp_path):
    images = BadImages(2, 1.0)
    images.note(bad("a"))
    images.exchange(tmp_path)
    images.note(bad("b"))
    with pytest.raises(InputError, match="2 of 2 images cannot be read"):
        images.exchange(tmp_path)


def test_a_resumed_run_counts_what_is_known_and_still_bad(tmp_path, caplog):
    """Of its checkpoint; a repaired and a removed image are forgotten."""
    save_images(tmp_path, 2, 0)
    (tmp_path / "bad.png").write_bytes(b"broken")
    named = [str(tmp_path / name) for name in ("00.png", "bad.png", "gone.png")]
    known = dict.fromkeys(["/data/t.tar:x.png", *named], "broken")
    images = BadImages(100, 0.02, known)
    images.forget_repaired()
    assert list(images.known) == ["/data/t.tar:x.png", named[1]]
    images.note([BadImage(path, "broken") for path in images.known])
    assert images.pending == 0
    images.exchange(tmp_path)
    assert not caplog.records
    assert listed(tmp_path)["count"] == 2
    images.note([BadImage(named[0], "broken again")])
    with pytest.raises(InputError, match=r"3 of 100 images .* DATA.MAX_BAD 0.02"):
        images.exchange(tmp_path)


def test_a_list_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / LIST).mkdir()
    images = BadImages(100, 0.03)
    images.note(bad("a"))
    images.exchange(tmp_path)
    assert list(images.known) == ["/data/a.jpg"]
    assert "the list of bad images" in caplog.records[-1].message


def exchanged(world: World, folder: Path) -> dict:
    """Three rounds: one of rank 1 alone, one of both with an overlap, one too many."""
    images, found = BadImages(100, 0.03), {}
    images.forget_repaired()
    images.note(bad("b") if world.rank else [])
    found["pending"] = images.pending
    images.exchange(folder)
    found["first"] = dict(images.known)
    images.note(bad("c", "b") if world.rank else bad("a", "c"))
    images.exchange(folder)
    found["second"] = list(images.known)
    images.note(bad("d") if world.rank else [])
    try:
        images.exchange(folder)
    except InputError as error:
        found["error"] = str(error)
    return found


def test_all_processes_know_the_same_and_stop_together(tmp_path):
    first, second = found_by_each(2, exchanged, tmp_path)
    assert (first.pop("pending"), second.pop("pending")) == (0, 1)
    assert first == second
    assert first["first"] == {"/data/b.jpg": "reason b"}
    assert first["second"] == [f"/data/{name}.jpg" for name in "abc"]
    assert "4 of 100 images cannot be read" in first["error"]
    assert [image["path"] for image in listed(tmp_path)["bad"]] == [
        f"/data/{name}.jpg" for name in "abcd"
    ]


# Whole runs

RUN = "TRAIN.EPOCHS 1 PRINT_FREQ 5 SEED 3 CKPT.KEEP_EVERY 1"


@pytest.fixture(scope="module")
def two_bad(tmp_path_factory) -> tuple[Path, list[str]]:
    """200 images of which two are bad, and the paths of those."""
    root = tmp_path_factory.mktemp("two_bad")
    save_images(root, 200, 0)
    names = [str(root / name) for name in ("103.png", "57.png")]
    for name in names:
        Path(name).write_bytes(Path(name).read_bytes()[:500])
    return root, names


def test_a_run_that_tolerates_none_stops_with_the_list(two_bad, pretrain, tmp_path):
    options = f"{RUN} DATA.PATH {two_bad[0]} DATA.MAX_BAD 0"
    done = pretrain(tmp_path, options, fails=True)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "of 200 images cannot be read, more than DATA.MAX_BAD 0 allows" in line
    assert str(tmp_path / LIST) in line
    assert "Traceback" not in done.stdout + done.stderr
    assert listed(tmp_path)["count"] >= 1


def test_a_run_with_kept_images_tells_all_bad_ones_first(two_bad, pretrain, tmp_path):
    """And is the run of images that are not kept."""
    options = f"{RUN} DATA.PATH {two_bad[0]} DATA.MAX_BAD 0.02 DATA.CACHE_SIZE 40"
    done = pretrain(tmp_path / "ram", f"{options} DATA.CACHE ram")
    assert done.stdout.index(f"{two_bad[1][1]} cannot be read") < done.stdout.index("step 1/")
    pretrain(tmp_path / "none", f"{options} DATA.CROPS device DATA.WORKERS 2")
    assert_same_run(tmp_path / "ram", tmp_path / "none")
    assert listed(tmp_path / "ram") == listed(tmp_path / "none")


def test_a_run_of_two_processes_completes_with_two_bad_images_and_lists_them(
    two_bad, pretrain, tmp_path
):
    batch = "TRAIN.BATCH_SIZE_PER_GPU 4 DATA.WORKERS 1"
    options = f"{RUN} DATA.PATH {two_bad[0]} DATA.MAX_BAD 0.02 {batch}"
    done = pretrain(tmp_path, options, processes=2)
    for name in two_bad[1]:
        assert done.stdout.count(f"warning: {name} cannot be read (") == 1
    assert "Traceback" not in done.stderr
    contents, lines = listed(tmp_path), log_of(tmp_path)
    assert [image["path"] for image in contents["bad"]] == two_bad[1]
    assert (contents["count"], contents["images"]) == (2, 200)
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20, 25]
    assert all(np.isfinite(line["loss"]) for line in lines)
