"""The multi-crop augmentation, and the transform of evaluations."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import v2

from datasets.multicrop import (
    Augmentation,
    MultiCrop,
    default_resize,
    eval_transform,
    normalised,
    sample_seed,
)
from tests.datasets.photographs import equal_crops, noise, pixels, rng_states, same
from utils.normalisation import IMAGENET

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
DEFAULTS = vars(Augmentation())


def plain(size: int = 24, **changed) -> MultiCrop:
    """Whole-image crops, two global and two local, with nothing random but what is changed."""
    sizes = {"global_crops_size": size, "local_crops_number": (2,), "local_crops_size": (size,)}
    return MultiCrop(Augmentation(**{**OFF, **sizes, **changed}))


@pytest.mark.parametrize(
    ("number", "size", "local"),
    [((2, 3), (16, 12), [16, 16, 12, 12, 12]), ((), (), []), ((0,), (96,), [])],
)
def test_shapes_and_order_for_any_number_of_local_sizes(number, size, local):
    crops = Augmentation(32, local_crops_number=number, local_crops_size=size)
    views = MultiCrop(crops)(noise(), 0)
    assert crops.sizes == [32, 32, *local]
    assert [tuple(v.shape) for v in views] == [(3, s, s) for s in crops.sizes]
    assert {(type(v), v.dtype) for v in views} == {(torch.Tensor, torch.uint8)}
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(views) if a.shape == b.shape)


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


def test_sample_seeds_stay_the_same_for_ever():
    assert sample_seed(0, 1, 2) == 15897544377361867571


def test_plain_crop_is_the_bicubic_resize_normalised():
    image = noise()
    expected = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC)) / 255
    expected = (expected - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    for view in map(normalised, plain(40)(image, 0)):
        np.testing.assert_allclose(view.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_every_grey_level_is_normalised_to_torchvisions_bits():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    theirs = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)]
    assert torch.equal(normalised(levels), v2.Compose(theirs)(levels))


def test_solarise_is_for_the_second_global_crop_only():
    image = noise()
    solarised = ImageOps.solarize(image, 128)
    views = plain(solarise_prob=1.0)(image, 3)
    assert [same(v, solarised) for v in views] == [False, True, False, False]
    assert [same(v, image) for v in views] == [True, False, True, True]


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
    view = eval_transform(size, default_resize(size))(image)
    assert (type(view), view.dtype) == (torch.Tensor, torch.float32)
    expected = (centre / 255 - IMAGENET.mean) / IMAGENET.std
    np.testing.assert_allclose(view.permute(1, 2, 0).numpy(), expected, atol=1e-5)
