"""Synthetic images are an instrument only if labels depend on the part and its boxes hold."""

import collections
import dataclasses
import multiprocessing

import numpy as np
import pytest

from datasets.synthetic_images import (
    COARSE_NAMES,
    DIFFICULTIES,
    PATTERNS,
    SyntheticConfig,
    render,
)
from utils.errors import InputError

EASY = DIFFICULTIES["easy"]
ALL_PATTERNS = {"fine_classes": 2 * len(PATTERNS)}


def _differing_box(first: np.ndarray, second: np.ndarray) -> tuple[int, int, int, int]:
    """The box, ends exclusive, of the pixels that differ between two images."""
    rows, columns = np.nonzero((first != second).any(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def _box_mask(size: int, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


# --- render ---


def test_render_depends_on_its_arguments_alone():
    jobs = [(DIFFICULTIES["hard"], 3, index, index % 10) for index in range(12)]
    here = [render(*job).image.tobytes() for job in jobs]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        elsewhere = pool.starmap(render, jobs[::-1], chunksize=5)
    assert [sample.image.tobytes() for sample in elsewhere[::-1]] == here
    assert len(set(here)) == len(here)
    assert render(DIFFICULTIES["hard"], 4, 0, 0).image.tobytes() != here[0]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_labels_of_one_body_differ_inside_the_box_only(difficulty):
    config = dataclasses.replace(DIFFICULTIES[difficulty], **ALL_PATTERNS)
    count = len(PATTERNS)
    for index in range(6):
        for coarse in range(2):
            samples = [render(config, 0, index, coarse * count + rank) for rank in range(count)]
            assert len({sample.part_box for sample in samples}) == 1
            inside = _box_mask(config.size, samples[0].part_box)
            for rank, sample in enumerate(samples):
                for other in samples[:rank]:
                    differ = (sample.image != other.image).any(axis=2)
                    assert not (differ & ~inside).any()
                    assert differ.sum() > 0.2 * config.part_area * config.size**2


def test_class_cue_reaches_beyond_the_box():
    config = dataclasses.replace(EASY, class_cue=0.5)
    first, second = (render(config, 0, 0, label) for label in (0, 1))
    differ = (first.image != second.image).any(axis=2)
    assert (differ & ~_box_mask(64, first.part_box)).sum() > 200


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("size", [32, 64])
def test_box_is_the_smallest_that_holds_the_part(difficulty, size):
    config = dataclasses.replace(DIFFICULTIES[difficulty], size=size, part_contrast=1.0)
    without = dataclasses.replace(config, part_contrast=0.0)
    for index in range(40):
        shown, bare = (render(c, 1, index, index % 10) for c in (config, without))
        x0, y0, x1, y1 = shown.part_box
        assert min(x0, y0) >= 0
        assert max(x1, y1) <= size
        assert _differing_box(shown.image, bare.image) == (x0, y0, x1, y1)


def test_part_is_never_cut_by_the_edge_of_the_image():
    """A cut disc would have a box that is not square."""
    boxes = np.array([render(EASY, 0, index, 5 + index % 5).part_box for index in range(400)])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert np.abs(sides[:, 0] - sides[:, 1]).max() <= 1


def test_part_without_contrast_leaves_nothing_to_tell_the_fine_class():
    config = dataclasses.replace(EASY, part_contrast=0.0)
    images = [render(config, 0, 5, label).image for label in range(10)]
    assert all((image == images[0]).all() for image in images[:5])
    assert (images[0] != images[5]).any()


def test_clutter_never_covers_the_part():
    """Clutter changes the ground but no pixel of the disc that fills the box."""
    config = dataclasses.replace(EASY, clutter=0)
    crowded = dataclasses.replace(EASY, clutter=150)
    for index in range(20):
        plain, full = (render(c, 0, index, index % 10) for c in (config, crowded))
        x0, y0, x1, y1 = plain.part_box
        y, x = np.mgrid[:64, :64] + 0.5
        disc = np.hypot(x - (x0 + x1) / 2, y - (y0 + y1) / 2) < (x1 - x0) / 2 - 2
        assert (plain.image[disc] == full.image[disc]).all()
        assert (plain.image[~disc] != full.image[~disc]).mean() > 0.1


@pytest.mark.parametrize("area", [0.03, 0.05, 0.1])
def test_part_takes_its_share_of_the_image(area):
    """The part is a disc, so it fills pi / 4 of a box, up to the half pixels at its rim."""
    config = dataclasses.replace(DIFFICULTIES["hard"], part_area=area, size=128)
    boxes = np.array([render(config, 0, i, i % 10).part_box for i in range(80)])
    sides = boxes[:, 2:] - boxes[:, :2] - 1
    areas = np.pi / 4 * sides.prod(axis=1) / config.size**2
    assert areas.mean() == pytest.approx(area, rel=0.05)
    assert areas.min() > 0.8 * area
    assert areas.max() < 1.2 * area


@pytest.mark.parametrize("coarse", range(2))
def test_part_moves_about_on_the_body(coarse):
    """Even when the body itself keeps its pose, and alike for all patterns of a body."""
    config = dataclasses.replace(EASY, part_area=0.05, pose_variation=0.0)
    boxes = np.array([render(config, 0, index, coarse * 5).part_box for index in range(200)])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert (np.ptp(centres, axis=0) > 10).all()
    assert np.abs(centres.mean(axis=0) - 32).max() < 2


def test_patterns_are_mirror_images_of_themselves():
    u, v = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(-1, 1, 41))
    for name, pattern in PATTERNS.items():
        np.testing.assert_allclose(pattern(u, v), pattern(-u, v), atol=1e-9, err_msg=name)


def test_patterns_differ_in_structure_and_not_in_tone():
    """Means inside the disc agree in grey; no pattern nor its negative is another one."""
    config = dataclasses.replace(
        EASY, **ALL_PATTERNS, size=256, pose_variation=0.0, part_contrast=1.0
    )
    samples = [render(config, 0, 0, label) for label in range(len(PATTERNS))]
    x0, y0, x1, y1 = samples[0].part_box
    grey = np.stack([s.image[y0:y1, x0:x1].mean(axis=2) for s in samples])
    y, x = np.mgrid[-1 : 1 : (y1 - y0) * 1j, -1 : 1 : (x1 - x0) * 1j]
    parts = grey[:, np.hypot(x, y) < 0.97]
    assert np.ptp(parts.mean(axis=1)) < 10
    likeness = np.abs(np.corrcoef(parts)) - np.eye(len(parts))
    assert likeness.max() < 0.75


def test_body_shape_and_nothing_else_tells_the_coarse_class():
    """The two bodies share the ground and clutter they do not cover."""
    config = dataclasses.replace(EASY, pose_variation=0.0)
    first, second = (render(config, 0, 0, label) for label in (0, 5))
    same = (first.image == second.image).all(axis=2)
    assert 0.3 < same.mean() < 0.8
    assert same[:6, :6].all()


def _corner_colours(identity: float) -> np.ndarray:
    """Mean colour of the top left corner, where no body reaches, by image."""
    config = dataclasses.replace(EASY, background_identity=identity, pose_variation=0.0)
    images = [render(config, 0, index, index % 10).image for index in range(100)]
    return np.stack([image[:10, :10].mean(axis=(0, 1)) for image in images])


def test_background_identity_sets_how_far_images_differ():
    spread = {b: _corner_colours(b).std(axis=0).mean() for b in (0.0, 0.5, 1.0)}
    assert spread[0.0] < 10
    assert 2 * spread[0.0] < spread[0.5] < spread[1.0]
    assert spread[1.0] > 30


def _texture_slants(identity: float) -> np.ndarray:
    """Log ratio of horizontal to vertical gradients in an image's four corners, by image."""
    config = dataclasses.replace(
        EASY, background_identity=identity, pose_variation=0.0, clutter=0, size=128
    )
    slants = []
    for index in range(60):
        grey = render(config, 0, index, 0).image.mean(axis=2)
        ends = (slice(0, 28), slice(100, 128))
        corners = np.stack([grey[rows, columns] for rows in ends for columns in ends])
        slants.append(np.log(np.diff(corners, axis=2).std() / np.diff(corners, axis=1).std()))
    return np.array(slants)


def test_texture_direction_tells_images_apart_only_with_identity():
    assert _texture_slants(0.0).std() < 0.22
    assert _texture_slants(1.0).std() > 0.8


def test_ground_and_clutter_are_drawn_anew_even_without_identity():
    first, second = (render(EASY, 0, index, 0).image for index in (0, 1))
    assert (first[:6, :6] != second[:6, :6]).mean() > 0.5


def test_body_variation_sets_how_far_body_colours_differ():
    spreads = []
    for variation in (0.0, 1.0):
        config = dataclasses.replace(
            EASY, body_variation=variation, part_contrast=0.0, pose_variation=0.0
        )
        images = [render(config, 0, index, 0).image for index in range(50)]
        spreads.append(np.std([i[28:36, 28:36].mean(axis=(0, 1)) for i in images], axis=0).mean())
    assert spreads[0] < 5 < 25 < spreads[1]


# --- settings ---


@pytest.mark.parametrize("fine_classes", [10, 16, 20, 24])
def test_classes_are_split_over_two_bodies_and_sorted(fine_classes):
    config = SyntheticConfig(fine_classes=fine_classes)
    names = config.class_names
    assert len(set(names)) == fine_classes >= 10
    assert list(names) == sorted(names)
    bodies = collections.Counter(name.split("_")[0] for name in names)
    assert bodies == dict.fromkeys(COARSE_NAMES, fine_classes // 2)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("size", [16, 64.0]),
        ("fine_classes", [8, 11, 26]),
        ("part_area", [0.0, 0.2]),
        ("part_contrast", [1.1, float("nan")]),
        ("background_identity", [-0.1]),
        ("body_variation", ["much"]),
        ("class_cue", [None]),
        ("clutter", [-1, True]),
        ("pose_variation", [2]),
    ],
)
def test_bad_setting_is_refused_by_name(field, values):
    for value in values:
        with pytest.raises(InputError, match=f"{field} is {value!r}; give a"):
            SyntheticConfig(**{field: value})


def test_difficulty_grows():
    easy, medium, hard = (DIFFICULTIES[name] for name in ("easy", "medium", "hard"))
    assert easy.part_area > medium.part_area > hard.part_area
    assert easy.part_contrast > medium.part_contrast > hard.part_contrast
    assert easy.background_identity < medium.background_identity < hard.background_identity
    assert easy.class_cue == medium.class_cue == hard.class_cue == 0
