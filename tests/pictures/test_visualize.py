"""visualize.py: the page as people get it, views at their place, matches that geometry knows."""

import base64
import io
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import visualize
from datasets import synthetic
from datasets.synthetic_images import DIFFICULTIES
from engine import build
from engine.evaluation import attention
from engine.pictures import maps, page, shown, steadiness, views
from engine.pictures.maps import PatchMap
from engine.pictures.matches import (
    centres,
    correspondence_figures,
    correspondence_picture,
    correspondences,
    judge,
)
from engine.pictures.shown import ShownImages
from engine.pictures.views import Place, PlacedView, seeded_views, whole_views
from models.registry import BackboneSpec, build_backbone
from tests.conftest import refusal_of
from tests.runs import RESNET, SWIN, small_config
from tests.test_readme import ROOT, commands
from utils import checkpoint, config
from utils.errors import InputError


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
        "config": config.to_dict(cfg),
        "model": build.model_description(cfg),
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
def show(called, tmp_path):
    """visualize.py in this process: show("flags") -> the folder; show(..., code=2) -> the line."""

    def run(*words, code: int = 0) -> Path | str:
        out = tmp_path / "out"
        done = called(visualize, *words, "--output_dir", out, "--device", "cpu")
        if code:
            return refusal_of(done)
        assert done.code == 0, done.err
        return out

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
    assert results["pictures"] == [
        *("maps_mil.png", "maps_lcr.png", "maps_self.png", "maps_similarity.png"),
        *("crops.png", "heads.png", "correspondence.png"),
        *("tsne_A.png", "tsne_B.png", "tsne_C.png"),
    ]
    for name, picture in zip(results["pictures"], pictures_of(whole), strict=True):
        assert min(picture.size) > 200
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
        # Of equally strong patches any is named: an even map scores chance.
        even = row["map"] == "mil" and row["accuracy"] == pytest.approx(row["chance"])
        assert even or row["accuracy"] in (0, 25, 50, 75, 100)
    text = " ".join(Page((out / "visualize.html").read_text()).words)
    assert f"{np.mean(share):.2f}" in text
    mil, *others = results["steadiness"]
    assert [row["map"] for row in others] == ["self", "similarity"]
    even = pytest.approx(100)
    assert mil == {"checkpoint": "A", "map": "mil", "images": 0, "effective_patches": even}
    for row in others:
        assert row["images"] == 10  # all of the folder, not those shown
        assert f"{row['steadiness']:.2f}" in text
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


def test_an_unreadable_image_beyond_those_shown_is_said_and_left_out(
    files, images, tmp_path, called
):
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    _, second, *_ = sorted(folder.rglob("*.png"))
    count = len(list(folder.rglob("*.png")))
    second.write_text("no image")
    words = "--checkpoint", files["vit"], "--images", folder, "--count", 1, "--tsne", 0
    done = called(visualize, *words, "--output_dir", tmp_path / "out", "--device", "cpu")
    results = json.loads((tmp_path / "out" / "visualize.json").read_text())
    assert results["steadiness"][-1]["images"] == count - 1
    assert str(second) in done.out


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


def test_many_images_go_by_the_batch_and_give_the_maps_of_one_forward():
    network = build.networks(small_config())[0].eval()
    seen = []
    network.backbone.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    pixels = torch.randn(70, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    many = [PlacedView(image, Place(0, 0, 64, 64)) for image in pixels]
    found = maps.maps_of_views(network, many, "similarity")
    assert max(seen) == views.BATCH
    expected = attention.attention_map(network, pixels, "similarity")
    assert torch.allclose(torch.stack([one.values for one in found]), expected, atol=1e-6)
    assert {(one.grid, one.cell, one.place) for one in found} == {((4, 4), 0.25, many[0].place)}
    seen.clear()
    assert len(correspondences(network, [(many[0], many[1])] * 40)) == 40
    assert max(seen) <= views.BATCH


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


def shown_images(count: int) -> ShownImages:
    """Grey squares of 100 pixels, each lighter than the last, with a part."""
    squares = [Image.new("RGB", (100, 100), (20 * index,) * 3) for index in range(count)]
    boxes = [(2 * index, 20, 40, 60) for index in range(count)]
    return ShownImages([f"001.a_bird/{i}.png" for i in range(count)], squares, boxes)


def peaked(patch: int, patches: int = 4) -> PatchMap:
    """A map of the whole image with nine tenths of the weight on one patch."""
    values = torch.full((patches,), 0.1 / (patches - 1))
    values[patch] = 0.9
    side = math.isqrt(patches)
    return PatchMap(values, (side, side), 1 / side, Place(0, 0, 100, 100))


def frames(axis) -> dict[str, tuple[float, ...]]:
    """The frames over a picture: colour -> x, y, width, height."""
    return {to_hex(box.get_edgecolor()): box.get_bbox().bounds for box in axis.patches}


def test_steadiness_of_known_maps():
    """The second view is the first shifted right by one patch of 4 x 4, and flipped."""
    first, second = Place(0, 0, 40, 40), Place(10, 0, 40, 40, flipped=True)

    def placed(values: torch.Tensor, place: Place) -> PatchMap:
        return PatchMap(values.flatten() / values.sum(), (4, 4), 0.25, place)

    image = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))  # patches of the image
    seen = [placed(image[:, :4], first)], [placed(image[:, 1:].flip(1), second)]
    beside = placed(image[:, 1:], second)  # the same in the view's own rows and columns
    told = steadiness.figures(seen[0] * 2, [*seen[1], beside])
    expected = np.corrcoef(image[:, 1:4].flatten(), image[:, 1:].flip(1)[:, :3].flatten())[0, 1]
    assert told["images"] == 2
    assert told["steadiness"] == pytest.approx((1 + expected) / 2)
    assert told["other_image"] == pytest.approx((1 + expected) / 2)
    entropies = [scipy.stats.entropy(of.values) for of in (*seen[0] * 2, *seen[1], beside)]
    assert told["effective_patches"] == pytest.approx(100 * np.exp(entropies).mean() / 16)
    alone = steadiness.figures(*seen)  # there is no other image
    assert alone.keys() == {"images", "steadiness", "effective_patches"}
    assert alone["steadiness"] == pytest.approx(1)


@pytest.mark.parametrize(("is_even", "left", "top"), [(True, 0, 0), (False, 30, 10)])
def test_steadiness_of_even_maps_and_of_views_that_share_little_is_not_told(is_even, left, top):
    """The second view shares 16 patches, or three of a column, with the first."""
    values = torch.full((16,), 1 / 16) if is_even else torch.arange(16) / 120
    first = PatchMap(values, (4, 4), 0.25, Place(0, 0, 40, 40))
    second = PatchMap(torch.arange(16) / 120, (4, 4), 0.25, Place(left, top, 40, 40))
    told = steadiness.figures([first], [second])
    assert told.keys() == {"images", "effective_patches"}
    assert told["images"] == 0


def test_a_sheet_holds_each_image_above_the_maps_of_all_networks():
    images = shown_images(5)
    of_networks = {"A": [peaked(i % 4) for i in range(5)], "B": [peaked(0, 9)] * 5}
    picture = maps.whole_picture(images, of_networks, "similarity")
    axes = np.array(picture.figure.axes).reshape(6, 4)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["", "A", "B"] * 2
    assert [axis.get_title() for axis in axes[0]] == ["a bird"] * 4
    for index in range(5):
        line, column = divmod(index, 4)
        image, *of_image = axes[3 * line : 3 * line + 3, column]
        assert np.asarray(image.images[0].get_array()).max() == 20 * index
        assert frames(image) == {"#00ffff": (2 * index, 20, 40 - 2 * index, 40)}
        for axis, patch_map in zip(of_image, (of_networks[k][index] for k in "AB"), strict=True):
            _, drawn = axis.images
            relative = patch_map.values.view(patch_map.grid) * len(patch_map.values)
            assert np.allclose(drawn.get_array(), relative)
            assert drawn.get_extent() == pytest.approx([0, 100, 100, 0])
            row, column_ = divmod(int(patch_map.values.argmax()), patch_map.grid[1])
            side = 100 * patch_map.cell
            strongest = frames(axis)["#ffffff"]
            assert strongest == pytest.approx((column_ * side, row * side, side, side))
    assert not any(axis.images for axis in axes[3:, 1:].flat)
    drawn = [axis.images[1] for axis in axes.flat if len(axis.images) == 2]
    assert len({image.get_clim() for image in drawn}) == 1  # one scale
    assert f"bright: {drawn[0].get_clim()[1]:.1f} times" in picture.caption
    assert "Cyan box: the part" in picture.caption


def test_the_last_patches_of_a_view_are_cut_off_where_it_ends():
    """Three patches of 0.4 of the view's side: 0.2 of the last are beyond it."""
    place = Place(20, 30, 50, 40)
    patch_map = PatchMap(torch.arange(9.0), (3, 3), 0.4, place)
    axis = Figure().add_subplot()
    maps.draw_map(axis, patch_map, 1.0, (100, 100))
    (drawn,) = axis.images
    assert drawn.get_extent() == pytest.approx([20, 80, 78, 30])
    clip = axis.transData.inverted().transform_bbox(drawn.clipbox)
    assert clip.get_points().ravel() == pytest.approx([20, 70, 70, 30])
    assert frames(axis) == {
        "#ffffff": pytest.approx((60, 62, 10, 8)),
        "#2b6cff": pytest.approx((20, 30, 50, 40)),
    }


def test_heads_beyond_a_line_go_on_in_the_next():
    images = shown_images(2)
    heads = {"A": [[peaked(head % 4) for head in range(8)]] * 2, "C": [[peaked(1)]] * 2}
    axes = np.array(maps.heads_picture(images, heads).figure.axes).reshape(6, 7)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["A", "A", "C"] * 2
    drawn = [[len(axis.images) for axis in row] for row in axes]
    assert drawn == [[1, *[2] * 6], [0, 2, 2, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0]] * 2
    assert [int(axis.images[1].get_array().argmax()) for axis in axes[1, 1:3]] == [2, 3]
    few = maps.heads_picture(images, {"A": [[peaked(0), peaked(1)]] * 2})
    assert [axis.get_title() for axis in few.figure.axes[:3]] == ["image", "head 1", "head 2"]


def test_crops_are_drawn_where_they_were_cut():
    images = shown_images(2)
    network = build.networks(small_config())[0].eval()
    cut = seeded_views(images.squares, 32, 16, 1, 0, plain=True)
    whole = whole_views(images.squares, 32)
    of_images = [[view, *crops] for view, crops in zip(whole, cut, strict=True)]
    picture = maps.crops_picture(images, {"A": network}, of_images)
    axes = np.array(picture.figure.axes).reshape(2, 5)
    titles = ["image", "whole", "global 1", "global 2", "local 1"]
    assert [axis.get_title() for axis in axes[0]] == titles
    assert "A: MIL attention" in picture.caption
    for row, of_image in zip(axes, of_images, strict=True):
        for axis, view in zip(row[1:], of_image, strict=True):
            place = view.place
            edges = [place.left, place.left + place.width, place.top + place.height, place.top]
            assert axis.images[1].get_extent() == pytest.approx(edges)
            assert ("#2b6cff" in frames(axis)) == (view is not of_image[0])
            expected = attention.attention_map(network, view.pixels[None], "mil")[0]
            drawn = np.asarray(axis.images[1].get_array()).ravel()
            assert np.allclose(drawn, expected * len(expected), atol=1e-5)


def test_lines_lead_to_the_matches_and_rings_show_the_missed_places():
    """Two equal views: the first patch matches its own place, the others the last one."""
    view = PlacedView(torch.zeros(3, 32, 32), Place(0, 0, 100, 100))
    found = judge(torch.tensor([0, *[24] * 24]), view.place, view.place, (5, 5), 0.2)
    picture = correspondence_picture([(view, view)], {"A": [found]}, 100)
    (axis,) = picture.figure.axes
    lines = [line for line in axis.lines if len(line.get_xdata()) == 2]
    assert len(lines) == 25
    assert len(axis.images) == 2
    start = axis.images[1].get_extent()[0]
    for line, right, origin, end in zip(
        lines, found.right.tolist(), found.centre.tolist(), found.matched.tolist(), strict=True
    ):
        (x0, x1), (y0, y1) = line.get_data()
        assert [x0, y0, x1 - start, y1] == pytest.approx([*origin, *end])
        assert line.get_linestyle() == ("-" if right else "--")
    rings = [(ring.center[0] - start, ring.center[1]) for ring in axis.patches]
    missed = [tuple(place) for place in found.true[~found.right].tolist()]
    assert np.allclose(rings, missed)
    few = correspondence_picture([(view, view)], {"A": [found]}, 3).figure.axes[0]
    assert len([line for line in few.lines if len(line.get_xdata()) == 2]) == 3


def test_the_first_run_decides_the_size_and_crops_fit_every_network(files):
    paths = [str(files["vit"]), str(files["swin"])]
    sources = shown.load_sources(paths, "teacher", torch.device("cpu"))
    assert list(sources) == ["A", "B"]
    assert shown.common_sizes(list(sources.values()), None) == (32, 16)
    assert shown.common_sizes(list(sources.values()), 64) == (64, 24)


def test_a_local_crop_too_small_for_a_network_is_refused_before_any_work(show, parts, tmp_path):
    sizes = ("MODEL__IMG_SIZE", "AUG__GLOBAL_CROPS_SIZE", "AUG__LOCAL_CROPS_SIZE")
    convnext = RESNET | {"MODEL__ARCH": "timm/test_convnext"} | dict.fromkeys(sizes, 64)
    path = stored(tmp_path, "convnext", **convnext)
    words = "--checkpoint", path, "--images", parts / "val", "--tsne", 0
    line = show(*words, code=2)
    assert "--size 64: a local crop of 27 pixels does not fit:" in line
    assert "images of 32 pixels and more go into" in line
    assert not (tmp_path / "out").exists()
    results = json.loads((show(*words, "--local_crops", 0) / "visualize.json").read_text())
    assert results["size"] == 64


def test_what_is_not_finite_is_not_drawn():
    network = build.networks(small_config())[1].eval()
    whole = whole_views([Image.new("RGB", (32, 32))], 32)
    maps.maps_of_views(network, whole, "similarity")
    network.backbone.norm.weight.data.fill_(3e38)  # finite, but what comes of it is not
    with pytest.raises(InputError, match="NaN or infinity, so there is nothing to show"):
        maps.maps_of_views(network, whole, "similarity")


def test_an_even_map_is_half_way_up_the_scale_and_an_outlier_does_not_set_it():
    def of(values):
        return [PatchMap(row, (10, 10), 0.1, Place(0, 0, 1, 1)) for row in values]

    even = torch.full((2, 100), 1 / 100)
    assert maps.brightest(of(even)) == 2
    bright = torch.full((2, 100), 0.5 / 99)
    bright[:, 7] = 0.5  # 50 times an even share, on 1 % of the patches
    assert maps.brightest([*of(bright), *of(even)]) == 2
    bright[:, :25] = 0.04
    assert maps.brightest(of(bright)) == pytest.approx(4)


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
        ("--checkpoint {vit} --images {empty}", "holds no images"),
        ("--checkpoint {vit} --images {vit}", "vit.pth cannot be read"),
        ("--checkpoint {vit} --images {images} {image}", "give one folder, or files"),
        ("--checkpoint {vit} --images {images} --size 60", "is not a multiple of 8 pixels, the"),
        (
            "--checkpoint {vit} --images {images} --count 0",
            "--count: must be a whole number from 1: 0",
        ),
        (
            "--checkpoint {vit} --images {images} --queries -1",
            "--queries: must be a whole number from 0",
        ),
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
