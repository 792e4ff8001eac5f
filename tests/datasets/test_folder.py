"""Image folders, and how their files become pixels."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from datasets import folder as folder_module
from datasets.folder import SYSTEM_FOLDERS, ImageFolder, UnreadableImage, load_image
from tests.datasets.photographs import noise, raw_png, save
from utils.errors import InputError
from utils.logging import setup


def test_class_folders_give_sorted_labels(tmp_path):
    save(tmp_path, "wren/b.png", "wren/deep/er/a.PNG", "auk/z.JPeG", "auk/y.webp")
    (tmp_path / "empty class").mkdir()
    folder = ImageFolder(tmp_path)
    assert folder.paths == ["auk/y.webp", "auk/z.JPeG", "wren/b.png", "wren/deep/er/a.PNG"]
    assert folder.classes == ["auk", "wren"]
    assert folder.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(np.asarray(folder.load(2)), np.asarray(noise(0)))


def test_images_without_classes_have_label_minus_one(tmp_path):
    folder = ImageFolder(save(tmp_path, "b.png", "sub/a.bmp", "a.tif"))
    assert folder.paths == ["a.tif", "b.png", "sub/a.bmp"]
    assert folder.classes == []
    assert folder.labels.tolist() == [-1, -1, -1]


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
    save(tmp_path, "a/x.png", "b/.hidden.txt.png", "a/.thumbs/z.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("none")
    setup(is_main=True)
    folder = ImageFolder(tmp_path)
    assert (folder.paths, folder.classes) == (["a/x.png"], ["a"])
    once = dict.fromkeys(("", ".mpg", ".h5", ".xml", ".md"), 1)
    assert folder.passed_over == {"hidden": 2, ".txt": 2, **once}
    line = "2 .txt, 2 hidden, 1 without an ending, 1 .h5, 1 .md, 2 others"
    assert capsys.readouterr().out.count(f"not images by their names: {line}\n") == 1


def test_links_are_followed_and_loops_end(tmp_path):
    save(tmp_path / "store", "x.png")
    save(tmp_path / "root", "a/y.png")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "store")
    (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root")
    assert ImageFolder(tmp_path / "root").paths == ["a/y.png", "b/x.png"]


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
    ("x.tif", np.uint16, [0, 256, 4095], [0, 16, 255], True),
    ("x.tif", np.uint16, [0, 256, 16383], [0, 1, 63], True),
    # 32 bits: mode I, negative and beyond 16 bits.
    ("x.tif", np.int32, [-9, 0, 7, 255], [0, 0, 7, 255], True),
    ("x.tif", np.int32, [0, 512, 65535], [0, 2, 255], False),
    ("x.tif", np.int32, [0, 500_000, 1_000_000], [0, 128, 255], True),
    # Floating point: 0..1, with an overshoot, 0..255, 0..65535, beyond, what is no number.
    ("x.tif", np.float32, [0, 0.5, 200 / 255, 1], [0, 128, 200, 255], True),
    ("x.tif", np.float32, [-0.02, 0.25, 1.03], [0, 64, 255], True),
    ("x.tif", np.float32, [0, 10.4, 261.5], [0, 10, 255], True),
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
    assert "of floating point: 3 of 9 that were looked at; no file says which" in sentence
    load_image(tmp_path / "1.tif")
    assert caplog.text == ""  # it was said
    monkeypatch.setattr(folder_module, "LOOKED_AT", 4)
    (sentence,) = ImageFolder(tmp_path).deep_grey()
    assert "1 of 3 that were looked at" in sentence


def test_colours_of_sixteen_bits_without_high_ones_are_unreadable(tmp_path):
    """Pillow reads the high byte alone: of 8-bit values nothing is left. An image may be black."""
    (tmp_path / "x.png").write_bytes(raw_png(1, 1, 16, 2, [struct.pack(">3H", 7, 100, 255)]))
    with pytest.raises(UnreadableImage, match="the high 8 are read, and all of them are 0"):
        load_image(tmp_path / "x.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    assert load_image(tmp_path / "black.png").getbbox() is None


def test_exif_orientation_is_applied_beside_a_damaged_tag(tmp_path):
    # Two entries (tag, type, count, value): a width that is a text, and the orientation.
    entries = struct.pack("<HHI4sHHIHH", 0x0100, 2, 4, b"wid", 0x0112, 3, 1, 6, 0)
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
