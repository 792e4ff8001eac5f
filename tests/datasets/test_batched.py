"""Multi-crop on whole batches: PIL's pixels, MultiCrop's distributions, no leaks."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as F

from datasets.batched import (
    CROP,
    NUMBER_OF_DRAWS,
    BatchedMultiCrop,
    Images,
    resize_by_products,
    resize_one_by_one,
)
from datasets.multicrop import Augmentation, MultiCrop, normalised
from datasets.synthetic_images import SyntheticConfig, render
from utils.normalisation import IMAGENET
from utils.seeding import derive_seed

OFF = {
    "color_jitter_prob": 0.0,
    "grey_prob": 0.0,
    "flip_prob": 0.0,
    "solarise_prob": 0.0,
    "blur_prob": (0.0, 0.0, 0.0),
}
# (height, width): crops of 40 and 24 pixels of these are made larger and smaller.
SIZES = [(150, 210), (33, 27), (64, 64), (12, 160), (180, 20), (7, 9)]
RESIZES = [resize_one_by_one, resize_by_products]
JITTER = ("brightness", "contrast", "saturation", "hue")
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
# Of a test of a true hypothesis; the seeds are fixed, so a pass is a pass for ever.
LEAST_P = 1e-3


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coarse colours with fine noise on them."""
    rng = np.random.default_rng((seed, height, width))
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth + rng.normal(0, 8, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def batch(pictures: list[Image.Image]) -> Images:
    height, width = (max(p.size[axis] for p in pictures) for axis in (1, 0))
    pixels = torch.full((len(pictures), 3, height, width), 90, dtype=torch.uint8)
    for into, p in zip(pixels, pictures, strict=True):
        into[:, : p.height, : p.width] = F.pil_to_tensor(p)
    return Images(pixels, [(p.height, p.width) for p in pictures])


def multicrop(**changed) -> BatchedMultiCrop:
    sizes = {"global_crops_size": 40, "local_crops_number": (4,), "local_crops_size": (24,)}
    return BatchedMultiCrop(Augmentation(**{**sizes, **changed}))


def draws(crops: BatchedMultiCrop, number: int, first: int = 0) -> torch.Tensor:
    return torch.stack([crops.draw(seed) for seed in range(first, first + number)])


def decided(crops: BatchedMultiCrop, size: tuple[int, int], number: int) -> np.recarray:
    return crops.parameters([size] * number, draws(crops, number))


def grey_levels(crop: torch.Tensor) -> np.ndarray:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    return ((crop.cpu() * std + mean) * 255).permute(1, 2, 0).double().numpy()


def by_pil(image: Image.Image, p: np.recarray, size: int) -> np.ndarray:
    """One crop made of PIL's and torchvision's operations with the parameters `p`."""
    box = (p.left, p.top, p.left + p.width, p.top + p.height)
    image = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    if p.flipped:
        image = ImageOps.mirror(image)
    if p.jittered:
        for number in p.order:
            image = ADJUST[number](image, p.strengths[number])
    if p.grey:
        image = image.convert("L").convert("RGB")
    if p.radius:
        image = image.filter(ImageFilter.GaussianBlur(float(p.radius)))
    if p.solarised:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image, dtype=np.float64)


# The same parameters give the same pixels


def differences(
    crops: BatchedMultiCrop, rounds: int = 5, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Mean grey levels between the batch's crops, made on the device, and PIL's, of every crop."""
    means = []
    for i in range(rounds):
        pictures = [picture(*size, seed=i) for size in SIZES]
        drawn = draws(crops, len(SIZES), first=100 * i)
        images = batch(pictures)
        views = crops(Images(images.pixels.to(device), images.sizes), drawn)
        parameters = crops.parameters(SIZES, drawn)
        for v, size in enumerate(crops.sizes):
            for b, image in enumerate(pictures):
                difference = grey_levels(views[v][b]) - by_pil(image, parameters[b, v], size)
                means.append(np.abs(difference).mean())
    return np.array(means)


def only(part: int, strength: float) -> dict:
    jitter = [strength if i == part else 0.0 for i in range(4)]
    return {"color_jitter": jitter, "color_jitter_prob": 1.0}


@pytest.mark.parametrize(
    ("options", "typical", "most"),
    [
        ({}, 0.03, 0.35),
        ({"flip_prob": 1.0}, 0.03, 0.35),
        (only(0, 0.4), 0.8, 1.15),
        (only(1, 0.4), 0.8, 1.25),
        (only(2, 0.2), 0.8, 1.05),
        (only(3, 0.1), 0.75, 1.8),
        ({"grey_prob": 1.0}, 0.3, 0.45),
        ({"blur_prob": (1.0, 1.0, 1.0)}, 0.5, 1.1),
        ({"solarise_prob": 1.0}, 0.03, 0.35),
    ],
    ids=["resize", "flip", *JITTER, "grey", "blur", "solarise"],
)
def test_each_operation_is_pils(options, typical, most):
    """Up to PIL's roundings: blends and hue cut off, which is half a level each time."""
    means = differences(multicrop(**{**OFF, **options}))
    assert means.mean() < typical
    assert means.max() < most


@pytest.mark.parametrize(("number", "size"), [((4,), (24,)), ((1, 2, 1), (24, 40, 24))])
def test_all_operations_in_their_order_are_pils(number, size):
    options = {"local_crops_number": number, "local_crops_size": size}
    means = differences(multicrop(solarise_prob=0.5, **options), rounds=12)
    assert means.mean() < 1.4
    assert means.max() < 3.5


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [24, 40, 160])
def test_resizes_are_pils(resize, size):
    crops, pictures = multicrop(), [picture(*size) for size in SIZES]
    p = crops.parameters(SIZES, draws(crops, len(SIZES)))[:, :6].T.ravel()
    source = np.arange(len(p.top)) % len(SIZES)
    found = resize(batch(pictures).pixels, source, p, size).permute(0, 2, 3, 1).double().numpy()
    for n, b in enumerate(source):
        edges = (p.left[n], p.top[n], p.left[n] + p.width[n], p.top[n] + p.height[n])
        expected = pictures[b].crop(edges).resize((size, size), Image.Resampling.BICUBIC)
        expected = ImageOps.mirror(expected) if p.flipped[n] else expected
        difference = np.abs(found[n] - np.asarray(expected, dtype=np.float64))
        # PIL rounds after each of its two passes, of which either may come first.
        assert difference.mean() < 0.4
        assert difference.max() < 3.5


def test_products_cut_overshoots_as_uint8_does():
    edge = Image.new("RGB", (16, 16))
    edge.paste((255, 255, 255), (8, 0, 16, 16))
    crops = multicrop(**OFF, global_crops_scale=(9.0, 9.0))
    whole = crops.parameters([(16, 16)], draws(crops, 1))[:, :1].T.ravel()
    found = resize_by_products(batch([edge]).pixels, np.array([0]), whole, 64)
    expected = F.pil_to_tensor(edge.resize((64, 64), Image.Resampling.BICUBIC))
    assert (found.min(), found.max()) == (0, 255)
    assert (found - expected).abs().max() < 1


# The distributions are those of the per-image path


def assert_same_distribution(left, right, what: str) -> None:
    assert stats.ks_2samp(left, right, method="asymp").pvalue > LEAST_P, what


@pytest.mark.parametrize("size", [(288, 384), (24, 500), (300, 40), (5, 7)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_are_distributed_as_random_resized_crops(size, scale):
    height, width = size
    number, image = 2500, Image.new("L", (width, height))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        rounds = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(number)]
    theirs = np.array(rounds).T
    crops = multicrop(global_crops_scale=scale, local_crops_number=(0,))
    p = decided(crops, size, number)[:, 0]
    ours = np.array([p.top, p.left, p.height, p.width])
    assert (ours[:2] >= 0).all()
    assert (ours[2:] > 0).all()
    assert (p.top + p.height).max() <= height
    assert (p.left + p.width).max() <= width

    def features(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, h, w = boxes
        free = {"top": (top, height - h), "left": (left, width - w)}
        shares = {name: at / np.maximum(room, 1) for name, (at, room) in free.items()}
        return {"area": h * w, "ratio": h / w, "height": h, "width": w, **shares}

    theirs_are = features(theirs)
    for name, values in features(ours).items():
        assert_same_distribution(values, theirs_are[name], name)


@pytest.mark.parametrize("size", [(24, 500), (300, 40), (30, 40), (9, 13), (1, 50), (50, 1)])
def test_a_box_that_never_fits_becomes_torchvisions_central_one(size):
    scale, image = (9.0, 9.0), Image.new("L", size[::-1])
    p = decided(multicrop(global_crops_scale=scale), size, 3)[:, 0]
    for box in zip(p.top, p.left, p.height, p.width, strict=True):
        assert box == RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))


@pytest.mark.parametrize("jitter", [(0.4, 0.4, 0.2, 0.1), (1.5, 0.0, 0.7, 0.5)])
def test_jitter_is_distributed_as_torchvisions(jitter):
    number = 2500
    p = decided(multicrop(color_jitter=jitter), (32, 32), number)
    reference = ColorJitter(*jitter)
    ranges = (reference.brightness, reference.contrast, reference.saturation, reference.hue)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        rounds = [ColorJitter.get_params(*ranges) for _ in range(number)]
    for part in range(4):
        ours = p.strengths[:, 0, part]
        theirs = [r[1 + part] for r in rounds]
        if ranges[part] is None:
            assert set(ours) == {1.0}
        else:
            assert_same_distribution(ours, theirs, str(part))
    _, counts = np.unique(p.order[:, :4].reshape(-1, 4), axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > LEAST_P


def test_probabilities_and_radii():
    number = 2500
    p = decided(multicrop(), (32, 32), number)
    on = {
        "flipped": (p.flipped, (0.5, 0.5, 0.5)),
        "jittered": (p.jittered, (0.8, 0.8, 0.8)),
        "grey": (p.grey, (0.2, 0.2, 0.2)),
        "solarised": (p.solarised, (0.0, 0.2, 0.0)),
        "blurred": (p.radius > 0, (1.0, 0.1, 0.5)),
    }
    views = (slice(0, 1), slice(1, 2), slice(2, 6))
    for name, (chosen, shares) in on.items():
        for view, share in zip(views, shares, strict=True):
            count, of = int(chosen[:, view].sum()), chosen[:, view].size
            assert stats.binomtest(count, of, share).pvalue > LEAST_P, (name, view)
    assert stats.kstest(p.radius[:, 0], stats.uniform(0.1, 1.9).cdf).pvalue > LEAST_P


def crop_statistics(crop: torch.Tensor) -> list[float]:
    """Mean, spread, gradient energy and colourfulness of a crop."""
    x = grey_levels(crop)
    gradient = np.square(np.diff(x, axis=0)).mean() + np.square(np.diff(x, axis=1)).mean()
    found = [x.mean(), x.std(), np.log(gradient + 1), np.ptp(x, axis=2).mean()]
    # A grey crop has the colourfulness 0, not the rounding of undoing the normalisation.
    return np.round(found, 3).tolist()


@pytest.mark.parametrize("size", [(64, 64), (20, 128), (9, 6)])
def test_crops_of_both_paths_have_the_same_statistics(size):
    rendered = Image.fromarray(render(SyntheticConfig(), 0, 0, 0).image)
    image = rendered.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    number = 300
    settings = Augmentation(32, local_crops_number=(1,), local_crops_size=(16,))
    per_image, batched = MultiCrop(settings), BatchedMultiCrop(settings)
    theirs = [[*map(normalised, per_image(image, seed))] for seed in range(number)]
    ours = batched(batch([image] * number), draws(batched, number))
    for view in range(3):
        left = np.array([crop_statistics(crop) for crop in ours[view]])
        right = np.array([crop_statistics(views[view]) for views in theirs])
        for name, a, b in zip(["mean", "std", "gradient", "colour"], left.T, right.T, strict=True):
            assert_same_distribution(a, b, f"view {view}: {name}")


# What a crop depends on, and what it does not


def test_a_crop_depends_on_its_own_image_and_draws_alone():
    """Together, in chunks of many crops, and alone without padding."""
    crops = multicrop()
    pictures = [picture(*SIZES[i % 6], seed=i) for i in range(60)]
    drawn = draws(crops, len(pictures))
    together = crops(batch(pictures), drawn)
    for n in range(0, len(pictures), 7):
        alone = crops(batch(pictures[n : n + 1]), drawn[n : n + 1])
        for view, of_all in zip(alone, together, strict=True):
            torch.testing.assert_close(view[0], of_all[n], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("option", "field"),
    [*zip(OFF, ("jittered", "grey", "flipped", "solarised", "radius"), strict=True)],
)
def test_switching_a_probability_changes_no_other_decision(option, field):
    plain, changed = multicrop(), multicrop(**{option: OFF[option]})
    left, right = (decided(c, (60, 80), 20) for c in (plain, changed))
    differing = [name for name in CROP.names if not np.array_equal(left[name], right[name])]
    assert differing == [field]


def test_draws_depend_on_the_seed_and_the_crops_place_alone():
    state = torch.get_rng_state()
    found = multicrop().draw(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.shape, found.dtype) == ((6, NUMBER_OF_DRAWS), torch.float32)
    for row, place in zip(found, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)], strict=True):
        generator = torch.Generator().manual_seed(derive_seed(5, *place))
        assert torch.equal(row, torch.rand(NUMBER_OF_DRAWS, generator=generator))


# Shapes and options


@pytest.mark.parametrize(
    ("number", "size"), [((2, 3), (24, 16)), ((1, 2), (40, 16)), ((0,), (24,)), ((), ())]
)
def test_shapes_and_order_and_images_are_left_as_they_are(number, size):
    crops = multicrop(local_crops_number=number, local_crops_size=size)
    images = batch([picture(*size) for size in SIZES])
    before = images.pixels.clone()
    views = crops(images, draws(crops, len(SIZES)))
    assert crops.sizes == [40, 40, *np.repeat(size, number)]
    assert [tuple(v.shape) for v in views] == [(6, 3, s, s) for s in crops.sizes]
    assert {v.dtype for v in views} == {torch.float32}
    assert all(v.is_contiguous() for v in views)
    assert torch.equal(images.pixels, before)
