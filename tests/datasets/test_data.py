"""Image folders, the multi-crop augmentation, and the loader of a whole run."""

import colorsys
import inspect
import os
import random
import signal
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps, features
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import Dataset

from datasets import folder as folder_module
from datasets.fine_grained import build_dataset
from datasets.folder import SYSTEM_FOLDERS, ImageFolder, UnreadableImage, load_image
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
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    MultiCrop,
    derive_seed,
    eval_transform,
    sample_seed,
)
from utils.errors import InputError
from utils.logging import setup

# Every random part off: with scale (1, 1) a square image comes through whole.
OFF = {
    "global_crops_scale": (1.0, 1.0),
    "local_crops_scale": (1.0, 1.0),
    "color_jitter_prob": 0.0,
    "grey_prob": 0.0,
    "flip_prob": 0.0,
    "solarise_prob": 0.0,
    "blur_prob": (0.0, 0.0, 0.0),
}
DEFAULTS = {n: p.default for n, p in inspect.signature(Augmentation).parameters.items()}


def noise(seed: int = 0, size: tuple[int, int] = (24, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(root / name)
    return root


def plain(size: int = 24, **changed) -> MultiCrop:
    """Whole-image crops, two global and two local, with nothing random but what is changed."""
    sizes = {"global_crops_size": size, "local_crops_number": (2,), "local_crops_size": (size,)}
    return MultiCrop(Augmentation(**{**OFF, **sizes, **changed}))


def pixels(crop: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: uint8 [S, S, 3]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((crop * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def same(crop: torch.Tensor, image: Image.Image) -> bool:
    return np.array_equal(pixels(crop), np.asarray(image))


def equal_crops(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(left, right, strict=True)]


def rng_states() -> list:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002


# Image folders


def test_class_folders_give_sorted_labels(tmp_path):
    save(tmp_path, "wren/b.png", "wren/deep/er/a.PNG", "auk/z.JPeG", "auk/y.webp")
    (tmp_path / "empty class").mkdir()
    folder = ImageFolder(tmp_path)
    assert folder.paths == ["auk/y.webp", "auk/z.JPeG", "wren/b.png", "wren/deep/er/a.PNG"]
    assert folder.classes == ["auk", "wren"]
    assert folder.labels == [0, 0, 1, 1]
    assert np.array_equal(np.asarray(folder.load(2)), np.asarray(noise(0)))


def test_images_without_classes_have_label_minus_one(tmp_path):
    folder = ImageFolder(save(tmp_path, "b.png", "sub/a.bmp", "a.tif"))
    assert folder.paths == ["a.tif", "b.png", "sub/a.bmp"]
    assert folder.classes == []
    assert folder.labels == [-1, -1, -1]


def test_hidden_entries_and_other_files_are_skipped(tmp_path):
    save(tmp_path, "a/x.png", "a/.x.png", ".cache/y.png", "a/.thumbs/z.png")
    (tmp_path / "a" / "notes.txt").write_text("none")
    (tmp_path / "README").write_text("none")
    folder = ImageFolder(tmp_path)
    assert folder.paths == ["a/x.png"]
    assert folder.classes == ["a"]


@pytest.mark.parametrize("name", sorted(SYSTEM_FOLDERS))
def test_folders_that_systems_make_are_no_classes(name, tmp_path):
    """A Synology's thumbnails, a bin of deleted files: at the top, or beside a class's images."""
    save(tmp_path, "a/x.png", f"{name}/a/x.png", f"a/{name}/x.png/SYNOPHOTO_THUMB_M.jpg")
    folder = ImageFolder(tmp_path)
    assert (folder.paths, folder.classes) == (["a/x.png"], ["a"])
    assert folder.passed_over == {name: 2}


def test_every_suffix_is_found(tmp_path):
    suffixes = ["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "ppm", "gif", "JPG", "Png"]
    suffixes += ["jfif", "jpe", "pgm", "tga", "jp2", "ico", "JFIF"]
    if features.check("avif"):
        suffixes.append("avif")
    names = [f"{i:02}.{suffix}" for i, suffix in enumerate(suffixes)]
    folder = ImageFolder(save(tmp_path, *names))
    assert folder.paths == names
    assert all(folder.load(i).size == (24, 24) for i in range(len(folder)))


def test_files_that_are_passed_over_are_counted_by_their_endings(tmp_path, capsys):
    names = ["a/1.txt", "a/2.TXT", "a/README", "b/clip.mpg", "b/data.h5", "b/c.d/e.xml", "notes.md"]
    save(tmp_path, "a/x.png", "b/.hidden.txt.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("none")
    setup(is_main=True)
    folder = ImageFolder(tmp_path)
    assert folder.paths == ["a/x.png"]
    assert folder.passed_over == {
        "hidden": 1,
        ".txt": 2,
        "": 1,
        ".mpg": 1,
        ".h5": 1,
        ".xml": 1,
        ".md": 1,
    }
    line = "2 .txt, 1 without an ending, 1 .h5, 1 .md, 1 .mpg, 2 others"
    assert capsys.readouterr().out.count(f"not images by their names: {line}\n") == 1


def test_links_are_followed_and_loops_end(tmp_path):
    save(tmp_path / "store", "x.png")
    save(tmp_path / "root", "a/y.png")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "store")
    (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root")
    assert {"a/y.png", "b/x.png"} <= set(ImageFolder(tmp_path / "root").paths)
    assert len(ImageFolder(tmp_path / "root")) == 2


def folder_error(root) -> str:
    with pytest.raises(InputError) as caught:
        ImageFolder(root)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_unusable_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("x")
    (tmp_path / "file.jpg").write_text("x")
    assert f"{tmp_path}/none does not exist: give" in folder_error(tmp_path / "none")
    file = str(tmp_path / "file.jpg")
    assert f"{file} cannot be read (Not a directory): give" in folder_error(file)
    assert "empty holds no images" in folder_error(tmp_path / "empty")
    assert "words holds no images, but 1 .txt: put" in folder_error(tmp_path / "words")
    assert "no data folder is named: give" in folder_error("")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    colour = {"L": (90, 90, 90), "LA": (90, 90, 90), "1": (255, 255, 255)}.get(mode, (204, 51, 102))
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr", "LAB") else "x.png")
    # The colour is one of the web palette's, so dithering has nothing to do.
    Image.new("RGB", (6, 4), colour).convert(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    rounded = 2 if mode in ("YCbCr", "LAB") else 0
    assert np.abs(np.asarray(image, dtype=int) - colour).max() <= rounded


def test_transparent_palette_becomes_rgb_without_a_warning(tmp_path, recwarn):
    image = Image.new("RGB", (6, 4), (204, 51, 102)).convert("P")
    image.save(tmp_path / "x.png", transparency=bytes(range(256)))
    assert (np.asarray(load_image(tmp_path / "x.png")) == (204, 51, 102)).all()
    assert not recwarn.list


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    assert np.asarray(load_image(tmp_path / "x.png"))[0, :, 1].tolist() == [0, 1, 128, 255]


def grey(path: Path, values: np.ndarray) -> list[int]:
    """What an image of these values becomes, the same in all three channels."""
    Image.fromarray(values).save(path)
    found = np.asarray(load_image(path))
    assert (found == found[..., :1]).all()
    return found[..., 0].ravel().tolist()


DEEP = [
    # 16 bits: full range, 8-bit values, 12-bit values, little of the range.
    ("x.png", np.uint16, [0, 255, 256, 511, 65535], [0, 0, 1, 1, 255], False),
    ("x.tif", np.uint16, [0, 255, 4096, 16384], [0, 0, 16, 64], False),
    ("x.tif", np.dtype(">u2"), [0, 256, 65535], [0, 1, 255], False),
    ("x.png", np.uint16, [0, 1, 100, 255], [0, 1, 100, 255], True),
    ("x.tif", np.uint16, [0, 40, 255], [0, 40, 255], True),
    ("x.tif", np.uint16, [0, 256, 4095], [0, 16, 255], True),
    ("x.tif", np.uint16, [0, 256, 16383], [0, 1, 63], True),
    # 32 bits: mode I, negative and beyond 16 bits.
    ("x.tif", np.int32, [-9, 0, 7, 255], [0, 0, 7, 255], True),
    ("x.tif", np.int32, [0, 512, 65535], [0, 2, 255], False),
    ("x.tif", np.int32, [0, 500_000, 1_000_000], [0, 128, 255], True),
    # Floating point: 0..1, with an overshoot, 0..255, 0..65535, beyond, what is no number.
    ("x.tif", np.float32, [0, 0.5, 200 / 255, 1], [0, 128, 200, 255], True),
    ("x.tif", np.float32, [-0.02, 0.25, 1.03], [0, 64, 255], True),
    ("x.tif", np.float32, [0, 10.4, 255], [0, 10, 255], True),
    ("x.tif", np.float32, [0, 10, 261.5], [0, 10, 255], True),
    ("x.tif", np.float32, [0, 256, 65535], [0, 1, 255], False),
    ("x.tif", np.float32, [0, 5e8, 1e9], [0, 128, 255], True),
    ("x.tif", np.float32, [np.nan, -np.inf, 0.5, np.inf, 1], [0, 0, 128, 255, 255], True),
    ("x.tif", np.float32, [np.nan, np.nan], [0, 0], True),
    ("x.tif", np.float32, [-3, -1], [0, 0], True),
]


@pytest.mark.parametrize(("name", "kind", "values", "levels", "guessed"), DEEP)
def test_grey_of_more_than_eight_bits(
    name, kind, values, levels, guessed, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(folder_module, "_said", bytearray(1))
    assert grey(tmp_path / name, np.array([values], dtype=kind)) == levels
    assert grey(tmp_path / f"again {name}", np.array([values], dtype=kind)) == levels
    said = [line.getMessage() for line in caplog.records]
    assert len(said) == guessed  # once, whatever the number of images
    assert all(f"{tmp_path / name} has pixels of" in line for line in said)


def test_images_whose_white_is_guessed_are_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(folder_module, "_said", bytearray(1))
    save(tmp_path, *[f"{n}.png" for n in range(6)])
    (tmp_path / "bad.tif").write_bytes(b"II*")
    assert ImageFolder(tmp_path).deep_grey() == []
    for n, kind in enumerate((np.uint16, np.float32, np.int32)):
        Image.fromarray(np.ones((4, 4), dtype=kind)).save(tmp_path / f"{n}.tif")
    (sentence,) = ImageFolder(tmp_path).deep_grey()
    assert "of floating point: 3 of 10 that were looked at; no file says which" in sentence
    load_image(tmp_path / "1.tif")
    assert caplog.text == ""  # it was said
    monkeypatch.setattr(folder_module, "LOOKED_AT", 4)
    (sentence,) = ImageFolder(tmp_path).deep_grey()
    assert "1 of 4 that were looked at" in sentence


def test_deep_colours_have_their_high_bits_or_are_unreadable(tmp_path):
    """Pillow reads the high byte of 16-bit colours: of 8-bit values nothing is left."""
    for values, bad in (([0, 256, 65535], False), ([7, 100, 255], True)):
        pixel = struct.pack(">3H", *values)
        chunks = [
            (b"IHDR", struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(b"\0" + pixel)),
            (b"IEND", b""),
        ]
        data = b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        if bad:
            with pytest.raises(UnreadableImage, match="the high 8 are read, and all of them are 0"):
                load_image(tmp_path / "x.png")
        else:
            assert load_image(tmp_path / "x.png").getpixel((0, 0)) == (0, 1, 255)
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    assert load_image(tmp_path / "black.png").getbbox() is None


def test_exif_orientation_is_applied_beside_a_damaged_tag(tmp_path):
    # Two entries (tag, type, count, value): a width that is a text, and the orientation.
    entries = struct.pack("<HHI4s", 0x0100, 2, 4, b"wid") + struct.pack(
        "<HHIHH", 0x0112, 3, 1, 6, 0
    )
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize("what", ["zTXt", "iTXt", "iCCP"])
def test_a_png_with_a_large_text_or_profile_is_read(what, tmp_path):
    """As editors and renderers write them: Pillow's own limit is 1 MB."""
    info, profile = PngInfo(), None
    if what == "iCCP":
        profile = bytes(3_000_000)
    else:
        (info.add_text if what == "zTXt" else info.add_itxt)("note", "a" * 3_000_000, zip=True)
    path = tmp_path / "x.png"
    Image.new("RGB", (9, 5), (10, 20, 30)).save(path, pnginfo=info, icc_profile=profile)
    assert load_image(path).getpixel((8, 4)) == (10, 20, 30)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn by 90 degrees clockwise
    noise(size=(8, 6)).save(tmp_path / "x.png", exif=exif)
    turned = noise(size=(8, 6)).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(load_image(tmp_path / "x.png")), np.asarray(turned))


def test_unreadable_image_tells_path_and_reason(tmp_path):
    noise(size=(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("words")
    reasons = {"cut.png": "truncated", "text.jpg": "known format", "gone.jpg": "No such file"}
    for name, reason in reasons.items():
        with pytest.raises(UnreadableImage) as caught:
            load_image(tmp_path / name)
        assert caught.value.bad.path == str(tmp_path / name)
        assert reason in caught.value.bad.reason
        assert str(tmp_path / name) not in caught.value.bad.reason


def test_registry(tmp_path):
    assert build_dataset("folder", save(tmp_path, "a/x.png")).classes == ["a"]
    match = r"no data set 'foldr' .did you mean folder.*: use one of .*cars"
    with pytest.raises(InputError, match=match):
        build_dataset("foldr", tmp_path)


# Augmentation


def test_shapes_and_order_for_several_local_sizes():
    crops = Augmentation(32, local_crops_number=(2, 3), local_crops_size=(16, 12))
    views = MultiCrop(crops)(noise(), 0)
    assert [tuple(v.shape) for v in views] == [(3, s, s) for s in [32, 32, 16, 16, 12, 12, 12]]
    assert crops.sizes == [32, 32, 16, 16, 12, 12, 12]
    assert {(type(v), v.dtype) for v in views} == {(torch.Tensor, torch.float32)}
    assert not any(torch.equal(a, b) for a, b in [views[0:2], views[2:4], views[4:6]])


@pytest.mark.parametrize(("number", "size"), [((), ()), ((0,), (96,))])
def test_no_local_crops(number, size):
    crops = Augmentation(32, local_crops_number=number, local_crops_size=size)
    assert [v.shape[-1] for v in MultiCrop(crops)(noise(), 0)] == crops.sizes == [32, 32]


def test_number_of_local_crops_leaves_the_other_crops_alone():
    def views(*number: int) -> list[torch.Tensor]:
        crops = MultiCrop(Augmentation(32, (0.4, 1.0), number, (16, 12)))
        return crops(noise(), 7)

    few, many = views(1, 2), views(4, 2)
    assert equal_crops(few, many[:3] + many[6:]) == [True] * 5
    assert not torch.equal(many[2], many[3])


def test_seed_decides_the_crops_and_global_rng_is_untouched():
    crops = MultiCrop(Augmentation(32, local_crops_number=(2,), local_crops_size=(16,)))
    torch.manual_seed(1)
    before = rng_states()
    first = crops(noise(), 5)
    assert rng_states() == before
    torch.manual_seed(2)
    assert equal_crops(first, crops(noise(), 5)) == [True] * 4
    assert equal_crops(first, crops(noise(), 6)) == [False] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_accelerator_rng_is_untouched():
    before = torch.cuda.get_rng_state()
    MultiCrop(Augmentation(32))(noise(), 5)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_sample_seeds_differ_and_stay_the_same_for_ever():
    assert sample_seed(0, 1, 2) == 15897544377361867571
    keys = [(s, e, i) for s in range(5) for e in range(10) for i in range(40)]
    assert len({sample_seed(*key) for key in keys}) == len(keys)
    assert len({derive_seed(1), derive_seed(1, 0), derive_seed(1, 0, 0)}) == 3


def test_plain_crop_is_the_bicubic_resize_normalised():
    image = noise()
    expected = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC)) / 255
    expected = (expected - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    for view in plain(40)(image, 0):
        np.testing.assert_allclose(view.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_solarise_is_for_the_second_global_crop_only():
    image = noise()
    solarised = ImageOps.solarize(image, 128)
    views = plain(solarise_prob=1.0)(image, 3)
    assert [same(v, solarised) for v in views] == [False, True, False, False]
    assert [same(v, image) for v in views] == [True, False, True, True]


def test_blur_probabilities_belong_to_their_crops():
    image = noise()
    for on, blurred in [((1, 0, 0), [0]), ((0, 1, 0), [1]), ((0, 0, 1), [2, 3])]:
        views = plain(blur_prob=on)(image, 1)
        assert [i for i, v in enumerate(views) if not same(v, image)] == blurred


def test_blur_is_pils_with_radii_spread_over_its_range():
    image, grid = noise(), np.linspace(0, 2.4, 97).tolist()
    filtered = [np.asarray(image.filter(ImageFilter.GaussianBlur(r)), dtype=int) for r in grid]
    crops = plain(blur_prob=(1, 0, 0), local_crops_number=(0,))
    radii = []
    for seed in range(60):
        blurred = pixels(crops(image, seed)[0])
        distance = [np.abs(f - blurred).mean() for f in filtered]
        assert min(distance) < 2
        radii.append(grid[int(np.argmin(distance))])
    assert 0.05 <= min(radii) < 0.6
    assert 1.8 < max(radii) <= 2.05
    assert 0.85 < np.mean(radii) < 1.25


@pytest.mark.parametrize(
    ("option", "shares"),
    [
        ("flip_prob", (0.5, 0.5, 0.5)),
        ("color_jitter_prob", (0.8, 0.8, 0.8)),
        ("grey_prob", (0.2, 0.2, 0.2)),
        ("solarise_prob", (0.0, 0.2, 0.0)),
        ("blur_prob", (1.0, 0.1, 0.5)),
    ],
)
def test_default_probabilities(option, shares):
    count, image = 400, noise(size=(8, 8))
    crops = plain(8, local_crops_number=(1,), **{option: DEFAULTS[option]})
    runs = [crops(image, seed) for seed in range(count)]
    changed = np.mean([[not same(view, image) for view in views] for views in runs], axis=0)
    # A blur of the least radius leaves every uint8 as it is.
    slack = 0.06 if option == "blur_prob" else 0
    for found, share in zip(changed, shares, strict=True):
        assert abs(found - share) <= 4 * (share * (1 - share) / count) ** 0.5 + slack


def test_flip_and_grey_are_what_they_say():
    image = noise()
    flipped = ImageOps.mirror(image)
    assert all(same(v, flipped) for v in plain(flip_prob=1.0)(image, 0))
    grey = image.convert("L").convert("RGB")
    assert all(same(v, grey) for v in plain(grey_prob=1.0)(image, 0))


def two_tone(left, right) -> Image.Image:
    image = Image.new("RGB", (8, 8), left)
    image.paste(right, (4, 0, 8, 8))
    return image


def chroma(colour) -> float:
    return float(max(colour)) - float(min(colour))


def hue_shift(colour) -> float:
    return (colorsys.rgb_to_hsv(*[float(c) for c in colour])[0] + 0.5) % 1 - 0.5


@pytest.mark.parametrize(
    ("part", "strength", "image", "measure"),
    [
        (0, 0.4, two_tone((100,) * 3, (100,) * 3), lambda p: p[0, 0, 0] / 100 - 1),
        (1, 0.4, two_tone((60,) * 3, (160,) * 3), lambda p: (p[0, 7, 0] - p[0, 0, 0]) / 100 - 1),
        (2, 0.2, two_tone((180, 80, 80), (180, 80, 80)), lambda p: chroma(p[0, 0]) / 100 - 1),
        (3, 0.1, two_tone((180, 80, 80), (180, 80, 80)), lambda p: hue_shift(p[0, 0])),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_default_colour_jitter_spans_its_ranges(part, strength, image, measure):
    alone = [value if i == part else 0 for i, value in enumerate(DEFAULTS["color_jitter"])]
    crops = plain(8, local_crops_number=(0,), color_jitter=alone, color_jitter_prob=1.0)
    values = [measure(pixels(crops(image, seed)[0]).astype(float)) for seed in range(150)]
    assert max(values) == pytest.approx(strength, abs=0.1 * strength + 0.01)
    assert min(values) == pytest.approx(-strength, abs=0.1 * strength + 0.01)


def test_default_crop_scales():
    ramp = np.arange(256, dtype=np.uint8)
    across, down = np.meshgrid(ramp, ramp)
    image = Image.fromarray(np.stack([across, down, down], axis=-1))
    scales = {name: DEFAULTS[name] for name in ("global_crops_scale", "local_crops_scale")}
    crops = plain(32, local_crops_number=(1,), **scales)
    areas = []
    for seed in range(150):
        views = [pixels(v).astype(float) for v in crops(image, seed)]
        sides = [(v[16, 31, 0] - v[16, 0, 0], v[31, 16, 1] - v[0, 16, 1]) for v in views]
        areas.append([w * h * (32 / 31) ** 2 / 256**2 for w, h in sides])
    low, high = np.min(areas, axis=0), np.max(areas, axis=0)
    np.testing.assert_allclose(low, [0.4, 0.4, 0.05], atol=0.04)
    np.testing.assert_allclose(high, [1.0, 1.0, 0.4], atol=0.06)


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (96, 110), (448, 512)])
def test_eval_transform(size, resize):
    image = noise(size=(300, 200))
    wide = image.resize((resize * 300 // 200, resize), Image.Resampling.BICUBIC)
    left, top = round((wide.width - size) / 2), round((resize - size) / 2)
    centre = np.asarray(wide.crop((left, top, left + size, top + size)))
    view = eval_transform(size)(image)
    assert (type(view), view.dtype) == (torch.Tensor, torch.float32)
    expected = (centre / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(view.permute(1, 2, 0).numpy(), expected, atol=1e-5)


# The run: sampler and loader


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
    for (crops, indices, _), (other_crops, other_indices, _) in zip(left, right, strict=True):
        assert torch.equal(indices, other_indices)
        assert all(equal_crops(crops, other_crops))


def test_batches_do_not_depend_on_workers_nor_on_the_first_step(photos):
    before = rng_states()
    whole = run_batches(photos, 0)
    crops, indices, _ = whole[0]
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
