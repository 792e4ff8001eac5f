"""visualize.py: the page as people get it, views at their place, matches that geometry knows."""

import base64
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import visualize
from datasets import synthetic
from datasets.synthetic_images import DIFFICULTIES
from engine import build
from engine.evaluation import attention
from engine.evaluation.source import Source
from engine.pictures import overlays, page, visual
from engine.pictures.overlays import Place
from engine.pictures.visual_pictures import brightest
from engine.pictures.visual_views import (
    centres,
    correspondence_figures,
    correspondences,
    judge,
    seeded_views,
)
from models.registry import BackboneSpec, build_backbone
from tests.runs import SWIN, small_config
from tests.test_readme import ROOT, commands
from utils import checkpoint
from utils.errors import run_script


class Page(HTMLParser):
    """What a page is made of: the names of its elements, what it refers to, its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.images, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if tag == "img" and name == "src":
                self.images.append(value)
            elif name in ("src", "href", "srcset", "data", "action") or name.startswith("on"):
                self.links.append(value)

    def handle_data(self, data):
        self.words.append(data)


def pictures_of(page: Page) -> list[Image.Image]:
    """The pictures inside, decoded."""
    found = []
    for source in page.images:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        found.append(image)
    return found


def stored(folder: Path, name: str, **options) -> Path:
    """A checkpoint of an untrained run; what the networks' files hold beside is left out."""
    cfg = small_config(**options)
    student, teacher = build.networks(cfg)
    only = {k: v for k, v in student.state_dict().items() if k not in teacher.state_dict()}
    state = {
        "format": checkpoint.FORMAT,
        "step": 0,
        "epoch": 0,
        "config": build.config.to_dict(cfg),
        "model": build.model_description(cfg, student),
        "student": student.state_dict(),
        "teacher": teacher.state_dict() | only,
    }
    path = folder / f"{name}.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A ViT of cmd, a Swin of lcr, and a bare ViT as someone else would save it."""
    folder = tmp_path_factory.mktemp("files")
    spec = BackboneSpec("vit_small", 64, (1,), (1,), patch_size=8, img_size=32)
    torch.save(build_backbone(spec).state_dict(), folder / "bare.pth")
    lcr = {"LOSS__OBJECTIVE": "lcr", "AUG__LOCAL_CROPS_NUMBER": 0, "MODEL__IMG_SIZE": 32}
    return {
        "vit": stored(folder, "vit", SEED=1),
        "swin": stored(folder, "swin", **SWIN, **lcr),
        "bare": folder / "bare.pth",
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A synthetic set with boxes, of images of 64 pixels."""
    folder = tmp_path_factory.mktemp("parts") / "set"
    synthetic.write_folder(DIFFICULTIES["easy"], 0, folder, train=20, val=10)
    return folder


@pytest.fixture
def show(monkeypatch, capfd, tmp_path):
    """visualize.py in this process: show("flags") -> the folder; show(..., code=2) -> stderr."""

    def run(*words, code: int = 0) -> Path | str:
        out = tmp_path / "out"
        words = [*words, "--output_dir", out, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, words)])
        if not code:
            run_script(visualize.main)
            return out
        with pytest.raises(SystemExit) as caught:
            run_script(visualize.main)
        assert caught.value.code == code
        (line,) = capfd.readouterr().err.splitlines()
        return line

    return run


def test_the_page_of_several_files_holds_everything(files, parts, show):
    out = show(
        *("--checkpoint", files["vit"], files["swin"], files["bare"], "--images", parts),
        *("--count", 5, "--detailed", 2, "--local_crops", 1, "--tsne", 10),
    )
    text = (out / "visualize.html").read_text()
    whole = Page(text)
    assert not whole.links
    assert not {"script", "link", "iframe", "object"} & set(whole.tags)
    assert "viewport" in text
    without_pictures = re.sub(r"base64,[^']*", "", text)
    assert "http" not in without_pictures
    assert "url(" not in without_pictures
    assert whole.tags.count("figcaption") == len(whole.images) == whole.tags.count("figure")

    results = json.loads((out / "visualize.json").read_text())
    assert [one["maps"] for one in results["checkpoints"]] == [
        ["mil", "self", "similarity"],
        ["lcr", "similarity"],
        ["self", "similarity"],
    ]
    wide = overlays.CELL
    expected = {  # rows and columns of each sheet, and pixels of its cells
        "maps_mil.png": (2 * 2, 4, (wide, wide)),
        "maps_lcr.png": (2 * 2, 4, (wide, wide)),
        "maps_self.png": (2 * 3, 4, (wide, wide)),
        "maps_similarity.png": (2 * 4, 4, (wide, wide)),
        "crops.png": (2 * 3, 5, (150, 150)),
        "heads.png": (2 * 2, 4, (150, 150)),  # of 3 heads and of 1
        "correspondence.png": (3, 2, (2 * wide + overlays.GAP, wide)),
    }
    sizes = [overlays.sheet_size(*sheet) for sheet in expected.values()] + [(1000, 800)] * 3
    assert results["pictures"] == [*expected, "tsne_A.png", "tsne_B.png", "tsne_C.png"]
    assert [picture.size for picture in pictures_of(whole)] == sizes
    for name, picture in zip(results["pictures"], pictures_of(whole), strict=True):
        with Image.open(out / name) as beside:
            assert np.array_equal(np.asarray(beside), np.asarray(picture))


def test_figures_are_of_the_images_shown_and_stand_beside_chance(files, parts, show):
    out = show("--checkpoint", files["vit"], "--images", parts / "val", "--count", 4, "--tsne", 0)
    results = json.loads((out / "visualize.json").read_text())
    names = sorted(name for name in synthetic.read_parts(parts) if name.startswith("val/"))
    assert results["images"] == [names[i].removeprefix("val/") for i in (0, 3, 6, 9)]
    # The run's crops have 32 pixels: a patch of 8 is 16 pixels of the stored image.
    share = []
    for name in results["images"]:
        x0, y0, x1, y1 = synthetic.read_parts(parts)[f"val/{name}"]
        columns = math.ceil(x1 / 16) - x0 // 16
        rows = math.ceil(y1 / 16) - y0 // 16
        share.append(100 * rows * columns / 16)
    pointing = results["pointing"]
    assert [row["map"] for row in pointing] == ["mil", "self", "similarity"]
    for row in pointing:
        assert row["chance"] == pytest.approx(np.mean(share))
        assert row["accuracy"] in (0, 25, 50, 75, 100)
    text = " ".join(Page((out / "visualize.html").read_text()).words)
    assert f"{np.mean(share):.2f}" in text
    (matches,) = results["correspondence"]
    assert f"{matches['on_or_beside']:.2f}" in text
    assert f"{matches['chance']:.2f}" in text


def test_files_without_boxes_or_classes_have_no_figures_of_them(files, images, show):
    chosen = sorted(images.rglob("*.png"))[:2]
    out = show("--checkpoint", files["bare"], "--size", 48, "--images", *chosen)
    results = json.loads((out / "visualize.json").read_text())
    assert results["pointing"] == []
    assert results["images"] == [path.name for path in chosen]
    assert not list(out.glob("tsne*"))


def test_the_seed_decides_the_views_and_nothing_else_does(images):
    squares = [Image.open(path) for path in sorted(images.rglob("*.png"))[:2]]

    def places(seed, plain):
        made = seeded_views(squares, 32, 16, 2, seed, plain)
        return [[view.place for view in of_image] for of_image in made]

    assert places(1, True) == places(1, True) != places(2, True)
    assert not any(place.flipped for of_image in places(1, True) for place in of_image)
    assert places(1, True)[0] != places(1, True)[1]
    two_local = seeded_views(squares, 32, 16, 2, 1, True)[0]
    assert [view.pixels.shape[-1] for view in two_local] == [32, 32, 16, 16]


def test_a_view_shows_what_lies_at_its_place():
    """Colours say where a pixel is from: red grows to the right, green downwards."""
    y, x = np.mgrid[:64, :96]
    pixels = np.stack([2 * x, 3 * y, 0 * x], axis=-1).astype(np.uint8)
    image = Image.fromarray(pixels)
    flips = set()
    for seed in range(6):
        plain = seed < 2
        for view in seeded_views([image], 32, 16, 1, seed, plain=True)[0] if plain else []:
            size = view.pixels.shape[-1]
            points = centres((size, size), 1 / size)
            at = view.place.to_image(points)
            shown = 255 * view.picture().flatten(0, 1)
            inner = ((points > 0.1) & (points < 0.9)).all(dim=1)
            expected = torch.stack([2 * (at[:, 0] - 0.5), 3 * (at[:, 1] - 0.5)], dim=1)
            torch.testing.assert_close(
                shown[inner, :2].double(), expected[inner].double(), atol=3, rtol=0
            )
        view = seeded_views([image], 32, 16, 0, seed, plain=False)[0][0]
        flips.add(view.place.flipped)
    assert flips == {True, False}


def test_places_map_there_and_back_and_a_flip_turns_left_and_right():
    place = Place(10, 20, 40, 20, flipped=True)
    points = torch.tensor([[0.0, 0.0], [0.25, 0.5], [1.0, 1.0]])
    at = place.to_image(points)
    assert at.tolist() == [[50, 20], [40, 30], [10, 40]]
    torch.testing.assert_close(place.to_view(at), points)


@pytest.mark.parametrize("options", [{}, SWIN])
def test_matches_of_a_view_with_itself_are_exact(options, images):
    network = build.networks(small_config(**options))[0].eval()
    square = Image.open(next(images.rglob("*.png")))
    views = seeded_views([square], 64, 16, 0, 3, plain=False)[0]
    (same,) = correspondences(network, [(views[0], views[0])])
    assert torch.equal(same.matched, same.centre)
    torch.testing.assert_close(same.true, same.centre)
    figures = correspondence_figures([same])
    assert figures["on_or_beside"] == 100
    assert figures["patches"] == len(same.centre)
    # Two views of different places are not.
    (two,) = correspondences(network, [(views[0], views[1])])
    assert correspondence_figures([two])["on_or_beside"] < 100


def test_many_images_go_by_the_batch_and_give_the_maps_of_one_forward(images):
    network = build.networks(small_config())[0].eval()
    subject = visual.Subject("A", Source(None, network))
    seen = []
    network.backbone.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    many = torch.randn(70, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = visual.whole_maps([subject], many)["similarity"]["A"]
        assert max(seen) == visual.BATCH
        assert torch.allclose(maps, attention.attention_map(network, many, "similarity"), atol=1e-6)
    square = Image.open(next(images.rglob("*.png")))
    views = seeded_views([square], 32, 16, 0, 3, plain=False)[0]
    seen.clear()
    assert len(correspondences(network, [tuple(views)] * 40)) == 40
    assert max(seen) <= 2 * visual.BATCH


def test_matches_are_the_highest_cosine_in_the_teacher_view(images):
    network = build.networks(small_config())[0].eval()
    square = Image.open(next(images.rglob("*.png")))
    views = seeded_views([square], 32, 16, 0, 3, plain=False)[0]
    (found,) = correspondences(network, [tuple(views)])
    with torch.no_grad():
        student, teacher = (network.backbone(view.pixels[None])[1][0] for view in views)
    for n, patch in enumerate(student):
        cosines = [float(patch @ other / patch.norm() / other.norm()) for other in teacher]
        assert torch.equal(found.matched[n], found.centre[int(np.argmax(cosines))])


def test_judging_matches_of_known_views():
    """The teacher view is the student's shifted right by one patch of 4 x 4, and flipped."""
    student, teacher = Place(0, 0, 40, 40), Place(10, 0, 40, 40, flipped=True)
    right = torch.tensor([[0, 3, 2, 1]]).expand(4, 4) + 4 * torch.arange(4)[:, None]
    found = judge(right.flatten(), student, teacher, (4, 4), 0.25)
    assert found.visible.view(4, 4).tolist() == [[False, True, True, True]] * 4
    assert torch.equal(found.right, found.visible)
    far = (right + 8) % 16  # two rows away
    assert not judge(far.flatten(), student, teacher, (4, 4), 0.25).right.any()
    beside = right.clone()
    beside[:, 3] += 1  # the right one is column 1
    assert judge(beside.flatten(), student, teacher, (4, 4), 0.25).right.sum() == 12
    # The corner's right patch is (0, 3): it and three others count; of 16.
    assert found.chance.view(4, 4)[0, 1] == 4 / 16
    assert found.chance.view(4, 4)[1, 2] == 9 / 16
    # The same row and column: column 1 is two off, columns 2 and 3 are right or two off.
    assert found.same_cell.view(4, 4).tolist() == [[False, False, True, False]] * 4


@pytest.mark.parametrize("flipped", [False, True])
def test_a_map_is_drawn_at_the_place_of_its_view(flipped):
    """Over a black image: patches of the view are coloured, the brightest where it belongs."""
    figure = Figure(figsize=(2, 2), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    values = torch.zeros(9)
    values[2] = 1.0  # right upper corner
    image = Image.new("RGB", (100, 100))
    # Three patches of 0.4 of the view: the last reach beyond it and are cut off.
    place = Place(20, 30, 50, 40, flipped)
    overlays.draw_map(axis, image, values, (3, 3), 0.4, 1.0, place)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    light = np.asarray(ImageOps.grayscale(Image.open(drawn).convert("RGB"))).astype(int)
    outside = light[2, 2]
    light[-1], light[:, -1] = outside, outside  # matplotlib leaves the picture's rim white
    changed = np.argwhere(abs(light - outside) > 10)
    (top, left), (bottom, right) = changed.min(0), changed.max(0)
    assert np.abs(np.array([left, top, right, bottom]) - [40, 60, 139, 139]).max() <= 1
    bright = np.argwhere(light == light[60:140, 40:140].max())
    (top, left), (bottom, right) = bright.min(0), bright.max(0)
    # One patch is 0.4 x 50 pixels wide, but the last column has 0.2 left.
    across = (40, 60) if flipped else (120, 140)
    assert np.abs(np.array([left, top, right, bottom]) - [across[0], 60, across[1], 92]).max() <= 2


def test_the_first_run_decides_the_size_and_crops_fit_every_network(files):
    found = visual.subjects([str(files["vit"]), str(files["swin"])], "teacher", torch.device("cpu"))
    assert visual.common_size(found, None) == (32, 8)
    assert visual.common_size(found, 64) == (64, 8)
    assert [subject.letter for subject in found] == ["A", "B"]


def test_an_even_map_is_half_way_up_the_scale_and_an_outlier_does_not_set_it():
    even = torch.full((2, 100), 1 / 100)
    assert brightest([even]) == 2
    peaked = torch.full((2, 100), 0.5 / 99)
    peaked[:, 7] = 0.5  # 50 times an even share, on 1 % of the patches
    assert brightest([peaked, even]) == 2
    peaked[:, :25] = 0.04
    assert brightest([peaked]) == pytest.approx(4)


def test_the_written_commands_parse(monkeypatch):
    for text in (visualize.__doc__, (ROOT / "docs/pictures.md").read_text()):
        (words,) = commands(text, "visualize.py")
        monkeypatch.setattr(sys, "argv", ["visualize.py", *words])
        assert len(visualize.parse().checkpoint) == 2


def test_text_in_a_page_is_escaped(tmp_path):
    words = "<b>&'\""
    parts = [page.table([(words, 1.0)], (words,)), page.paragraph(words), page.heading(words)]
    page.write(tmp_path / "page.html", words, parts)
    found = Page((tmp_path / "page.html").read_text())
    assert "b" not in found.tags
    assert found.words.count(words) == 6


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--checkpoint {missing} --images {images}", "there is no checkpoint at"),
        ("--checkpoint {image} --images {images}", "00.png"),
        ("--checkpoint {vit} --images {missing}", "does not exist"),
        ("--checkpoint {vit} --images {empty}", "is empty: put images in it"),
        ("--checkpoint {vit} --images {vit}", "vit.pth cannot be read"),
        ("--checkpoint {vit} --images {images} {image}", "give one folder, or files"),
        ("--checkpoint {vit} --images {images} --size 60", "must be a multiple of 8, the patch"),
        ("--checkpoint {vit} --images {images} --count 0", "--count must be at least 1, not 0"),
        ("--checkpoint {vit} --images {images} --queries -1", "--queries must be at least 0"),
        ("--checkpoint {bare} --checkpoint_key other --images {images}", "'other'"),
        ("--images {images}", "--checkpoint"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(flags, words, files, images, tmp_path, show):
    (tmp_path / "empty").mkdir()
    places = {name: str(path) for name, path in files.items()}
    places |= {
        "images": str(images),
        "image": str(images / "red" / "00.png"),
        "missing": str(tmp_path / "missing.pth"),
        "empty": str(tmp_path / "empty"),
    }
    line = show(*flags.format(**places).split(), code=2)
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "out" / "visualize.html").exists()
