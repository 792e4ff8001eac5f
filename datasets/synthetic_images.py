"""One image of the synthetic fine-grained set, rendered from a seed (ours).

Every image shows one creature on a cluttered ground. Two coarse classes differ in the
body's shape (`round`, `slim`); the fine classes within one share body, colours, pose,
ground and clutter, and differ only in the pattern on a small round badge, the *part*,
which sits at a varying place on the body. The part's box is stored beside the label, so
one can ask whether a self-supervised network's attention finds what decides the class.

How the classes are built:

- A class is a pair (body, pattern), and both bodies use the same patterns. The pattern
  alone therefore says nothing about the coarse class, nor the body about the pattern, and
  `fine_classes` from 10 to 24 needs only 5 to 12 patterns that stay legible at 64 pixels.
- Every pattern inks exactly half of the same disc in the same two tones, so neither the
  part's outline nor its mean colour tells classes apart: only its structure does.
- Every pattern is its own mirror image, and differs from the others in grey, so flips,
  colour jitter and greyscale in the multi-crop recipe do not change the class.
- All random draws depend on (seed, index) and never on the label: two labels of one body
  at the same index give the same image outside the part's box (with `class_cue` 0).

`background_identity` and `body_variation` set how much identifies an image without its class: a
shortcut past the part.
"""

import colorsys
import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from utils.errors import InputError

COARSE_NAMES = ("round", "slim")

Box = tuple[int, int, int, int]
Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _to_grid(u: np.ndarray, v: np.ndarray, pitch: float) -> np.ndarray:
    """Distance from each point to the nearest node of a square grid."""
    return np.hypot(u - pitch * np.round(u / pitch), v - pitch * np.round(v / pitch))


# Scalar fields on the unit disc, u to the right and v down; ink is where a field exceeds
# its median over the disc. All are even in u. The most distinct come first, because a set
# of 2n classes uses the first n.
PATTERNS: dict[str, Field] = {
    "stripes": lambda u, v: np.cos(3 * np.pi * v),
    "cross": lambda u, v: -np.minimum(np.abs(u), np.abs(v)),
    "checker": lambda u, v: np.cos(2.1 * np.pi * u) * np.cos(2.1 * np.pi * v),
    "ring": lambda u, v: -np.abs(np.hypot(u, v) - 0.62),
    "half": lambda u, v: v,
    "bars": lambda u, v: np.cos(3 * np.pi * u),
    "triangle": lambda u, v: -np.maximum(v, 0.87 * np.abs(u) - 0.5 * v),
    "spot": lambda u, v: -np.hypot(u, v),
    "dots": lambda u, v: -_to_grid(u, v, 0.62),
    "hourglass": lambda u, v: np.abs(v) - np.abs(u),
    "chevron": lambda u, v: np.cos(2.6 * np.pi * (v - 0.9 * np.abs(u))),
    "fan": lambda u, v: np.cos(5 * np.arctan2(u, -v)),
}


def _setting(default: float, low: float, high: float, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"range": (low, high), "help": text})


def in_range(name: str, value: Any, kind: type, low: float, high: float) -> Any:
    """The setting as `kind`, int or float; InputError where it is none or out of range."""
    whole = kind is int
    known = isinstance(value, numbers.Integral if whole else numbers.Real)
    if not known or isinstance(value, bool) or not low <= value <= high:
        raise InputError(
            f"The synthetic set's {name} is {value!r}; give {'a whole' if whole else 'a'} number "
            f"from {low} to {high}."
        )
    return kind(value)


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Everything but the seed that decides what the set looks like; the defaults are "medium".

    Each field's range, inclusive, and help stand beside its default. Raises InputError for a field
    of the wrong type or out of range, and an odd `fine_classes`.
    """

    size: int = _setting(64, 32, 2048, "side of the square image in pixels")
    fine_classes: int = _setting(
        10, 10, 2 * len(PATTERNS), "number of fine classes, even, split over 2 body shapes"
    )
    part_area: float = _setting(0.08, 0.01, 0.1, "area of the part as a share of the image's area")
    part_contrast: float = _setting(
        0.8, 0.0, 1.0, "tone of the part: 1 = near black on near white, 0 = invisible (a control)"
    )
    background_identity: float = _setting(
        0.4,
        0.0,
        1.0,
        "how much background and clutter identify the image: 0 = all images share colours and "
        "texture, 1 = every image has its own",
    )
    body_variation: float = _setting(
        0.3, 0.0, 1.0, "how much the body's colour varies from image to image, whatever the class"
    )
    class_cue: float = _setting(
        0.0,
        0.0,
        1.0,
        "how much the body's hue and ripple spacing tell the fine class: 0 = only the part does",
    )
    clutter: int = _setting(6, 0, 200, "number of clutter objects behind the body")
    pose_variation: float = _setting(
        1.0,
        0.0,
        1.0,
        "at 1 the body turns by up to 20 degrees, shifts by up to 0.2 of the side and shrinks "
        "by up to 15 percent",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = in_range(field.name, value, field.type, *field.metadata["range"])
            # One type a field, so that equal settings also compare equal once stored.
            object.__setattr__(self, field.name, value)
        if self.fine_classes % 2:
            raise InputError(
                f"The synthetic set's fine_classes is {self.fine_classes}; give an even number, "
                "because the classes are split evenly over 2 body shapes."
            )

    @property
    def part_names(self) -> tuple[str, ...]:
        """The patterns in use, in alphabetical order."""
        return tuple(sorted(list(PATTERNS)[: self.fine_classes // 2]))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by label; alphabetical, so torchvision's ImageFolder gives these labels."""
        return tuple(f"{body}_{part}" for body in COARSE_NAMES for part in self.part_names)


# Pose varies fully in all: cropping removes it, so it costs a self-supervised network little,
# while without it raw pixels match parts by place.
DIFFICULTIES = {
    "easy": SyntheticConfig(
        part_area=0.1, part_contrast=1.0, background_identity=0.0, body_variation=0.0, clutter=3
    ),
    "medium": SyntheticConfig(),
    "hard": SyntheticConfig(
        part_area=0.05, part_contrast=0.5, background_identity=1.0, body_variation=1.0, clutter=12
    ),
}


class Sample(NamedTuple):
    """One rendered image, (size, size, 3) uint8 RGB.

    part_box: (x0, y0, x1, y1) in pixels, x1 and y1 exclusive: the smallest box that holds every
    pixel the part touches.
    """

    image: np.ndarray
    part_box: Box


def render(config: SyntheticConfig, seed: int, index: int, label: int) -> Sample:
    """Image `index` of the set with this seed, as class `label`, a place in `class_names`.

    A pure function of its arguments: neither the order of calls nor the process matters. seed
    and index: from 0 to 2**32 - 1.
    """
    coarse, rank = divmod(int(label), config.fine_classes // 2)
    # One stream per layer, so that a setting of one layer leaves the others' draws alone.
    streams = np.random.SeedSequence((int(seed), int(index))).spawn(4)
    ground_rng, clutter_rng, pose_rng, look_rng = map(np.random.default_rng, streams)
    canvas = _background(config, ground_rng)
    _draw_clutter(canvas, config, clutter_rng)
    pose = _draw_pose(config, coarse, pose_rng)
    tone, ripples = _body_look(config, rank, look_rng)
    _draw_body(canvas, config.size, coarse, pose, tone, ripples)
    pattern = PATTERNS[config.part_names[rank]]
    box = _draw_part(canvas, config.size, config.part_contrast, pattern, pose, tone)
    image = np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return Sample(image, box)


# --- ground and clutter ---------------------------------------------------------------

_GROUND_TONES = np.array([[0.40, 0.47, 0.36], [0.58, 0.62, 0.50]], np.float32)
_CLUTTER_TONES = np.array([[0.33, 0.42, 0.28], [0.50, 0.46, 0.36], [0.66, 0.68, 0.55]], np.float32)


def _background(config: SyntheticConfig, rng: np.random.Generator) -> np.ndarray:
    """Two tones mixed by smooth noise; an image's own tones and weave as identity grows."""
    identity = config.background_identity
    tones = _mix(_GROUND_TONES, rng.random((2, 3)), identity)
    # Fine grain looks alike in all images; broad patches tell an image apart.
    field = (1 - identity) * _noise(config.size, 14, rng) + identity * _noise(config.size, 4, rng)
    x, y = _grid(config.size)
    angle, cycles, phase = rng.uniform(0, np.pi), rng.uniform(3, 12), rng.uniform(0, 2 * np.pi)
    weave = np.sin(2 * np.pi * cycles * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    field = field + 0.8 * identity * weave
    # A fixed mean keeps the mean colour from telling images apart.
    field = 0.5 + 0.28 * (field - field.mean()) / field.std()
    return (tones[0] + field[..., None] * (tones[1] - tones[0])).astype(np.float32)


def _noise(size: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of `cells` random values a side, unit variance, (size, size)."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    field = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return field / field.std()


def _draw_clutter(canvas: np.ndarray, config: SyntheticConfig, rng: np.random.Generator) -> None:
    """Leaves, sticks and pebbles: capsules of random length, width and direction."""
    own_tones = rng.random((len(_CLUTTER_TONES), 3))
    tones = _mix(_CLUTTER_TONES, own_tones, config.background_identity)
    own_shape = rng.uniform((0.0, 0.012), (0.12, 0.07))
    size = config.size
    for _ in range(config.clutter):
        shape = rng.uniform((0.0, 0.012), (0.12, 0.07))
        half, radius = _mix(shape, own_shape, config.background_identity)
        centre, angle = rng.random(2), rng.uniform(0, np.pi)
        tone = tones[rng.integers(len(tones))] * rng.uniform(0.9, 1.1)
        window = _window(centre, half + radius, size)
        x, y = _local(size, window, centre, angle)
        _paint(canvas[window], _cover(_capsule(x, y, half, radius), size), tone)


# --- body -----------------------------------------------------------------------------


class _Pose(NamedTuple):
    """Where body (`half` and `radius` its capsule's) and part lie, in shares of the side."""

    centre: np.ndarray
    angle: float
    scale: float
    mirror: float
    half: float
    radius: float
    part_centre: np.ndarray
    part_radius: float


# Half length of the capsule's axis and its radius; both bodies have about the same area
# and hold the largest part at the smallest scale.
_BODY_SHAPES = ((0.0, 0.32), (0.17, 0.235))


def _draw_pose(config: SyntheticConfig, coarse: int, rng: np.random.Generator) -> _Pose:
    """Draw a pose at random; the body may leave the image in part, the badge may not."""
    pose = config.pose_variation
    angle = np.deg2rad(20) * pose * rng.uniform(-1, 1)
    centre = 0.5 + 0.2 * pose * rng.uniform(-1, 1, 2)
    scale = 1 - 0.15 * pose * rng.random()
    mirror = rng.choice((-1.0, 1.0))
    area = config.part_area * (1 + 0.1 * pose * rng.uniform(-1, 1))
    half, radius = scale * np.array(_BODY_SHAPES[coarse])
    part_radius = np.sqrt(area / np.pi)
    # Within the body, so that its rim shows around the part.
    along = rng.uniform(-half, half)
    turn = rng.uniform(0, 2 * np.pi)
    reach = (radius - part_radius - 0.01) * np.sqrt(rng.random())
    offset = np.array([along + reach * np.cos(turn), reach * np.sin(turn)])
    cos, sin = np.cos(angle), np.sin(angle)
    part_centre = centre + np.array([[cos, -sin], [sin, cos]]) @ offset
    margin = part_radius + 1 / config.size
    shift = np.clip(part_centre, margin, 1 - margin) - part_centre
    return _Pose(
        centre + shift, angle, scale, mirror, half, radius, part_centre + shift, part_radius
    )


def _draw_body(
    canvas: np.ndarray, size: int, coarse: int, pose: _Pose, tone: np.ndarray, ripples: float
) -> None:
    """Draw the creature: a disc with a head, or a capsule with a tail."""
    scale = pose.scale
    x, y = _local(size, np.s_[:, :], pose.centre, pose.angle)
    x = x * pose.mirror
    if coarse == 0:
        limb, eye = np.hypot(x, y + 0.33 * scale) - 0.12 * scale, (0.0, -0.36)
    else:  # a wedge that opens away from the body
        limb = np.maximum(np.abs(y) + 0.9 * (x + 0.3 * scale), -0.48 * scale - x)
        eye = (0.31, -0.05)
    _paint(canvas, _cover(limb, size), 0.7 * tone)
    edge = _capsule(x, y, pose.half, pose.radius)
    _paint(canvas, _cover(edge, size), 0.55 * tone)
    light = 1 - 0.2 * y / pose.radius + 0.05 * np.sin(2 * np.pi * ripples * x)
    _paint(canvas, _cover(edge + 0.018, size), light[..., None] * tone)
    pupil = np.hypot(x - scale * eye[0], y - scale * eye[1]) - 0.025 * scale
    _paint(canvas, _cover(pupil, size), 0.1 * tone)


def _body_look(
    config: SyntheticConfig, rank: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """The body's RGB tone and its ripples per image side."""
    shift, dull, dim = config.body_variation * rng.uniform(-1, 1, 3)
    cue = config.class_cue * rank / len(config.part_names)
    hue = (0.08 + 0.5 * shift + cue) % 1
    tone = np.array(colorsys.hsv_to_rgb(hue, 0.5 + 0.25 * dull, 0.62 + 0.13 * dim))
    return tone, 9 * (1 + cue)


# --- part -----------------------------------------------------------------------------


def _draw_part(
    canvas: np.ndarray, size: int, contrast: float, pattern: Field, pose: _Pose, tone: np.ndarray
) -> Box:
    """Draw the badge last, so that nothing covers it, and return its box."""
    radius = pose.part_radius
    window = _window(pose.part_centre, radius, size)
    x, y = _local(size, window, pose.part_centre, pose.angle)
    cover = _cover(np.hypot(x, y) - radius, size)
    # A fainter rim would not show in 8 bits, and the box would not be tight.
    cover[cover < 0.05] = 0
    ink = _ink(pattern, x / radius, y / radius, pose.angle, 1 / (size * radius))
    paper_tone = _mix(tone, np.full(3, 0.96), contrast)
    ink_tone = _mix(tone, np.full(3, 0.06), contrast)
    _paint(canvas[window], cover, _mix(paper_tone, ink_tone, ink[..., None]))
    rows, columns = np.nonzero(cover)
    x, y = columns + window[1].start, rows + window[0].start
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def _ink(pattern: Field, u: np.ndarray, v: np.ndarray, angle: float, pixel: float) -> np.ndarray:
    """Share of each pixel that is ink, from 4 x 4 samples; `pixel` is its side in u."""
    steps = (np.arange(4) - 1.5) / 4 * pixel
    dy, dx = (step.reshape(-1, 1, 1) for step in np.meshgrid(steps, steps, indexing="ij"))
    cos, sin = np.cos(angle), np.sin(angle)
    samples = pattern(u + cos * dx + sin * dy, v - sin * dx + cos * dy)
    return (samples > _median(pattern)).mean(axis=0)


@functools.cache
def _median(pattern: Field) -> float:
    """The pattern's median over the unit disc: the threshold that inks half of it."""
    u, v = np.meshgrid(*[np.linspace(-1, 1, 801)] * 2)
    return float(np.median(pattern(u, v)[np.hypot(u, v) < 1]))


# --- drawing --------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres (x, y) in shares of the side, each broadcastable to (size, size)."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return centres[None, :], centres[:, None]


def _window(centre: np.ndarray, reach: float, size: int) -> tuple[slice, slice]:
    """Rows and columns of the image within `reach` of a centre, and a pixel more."""
    low = np.clip(np.floor((centre - reach) * size) - 1, 0, size).astype(int)
    high = np.clip(np.ceil((centre + reach) * size) + 1, 0, size).astype(int)
    return slice(low[1], high[1]), slice(low[0], high[0])


def _local(
    size: int, window: tuple[slice, slice], centre: np.ndarray, angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """The window's pixel centres in a frame at `centre`, turned by `angle`."""
    x, y = _grid(size)
    x, y = x[:, window[1]] - np.float32(centre[0]), y[window[0]] - np.float32(centre[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _capsule(x: np.ndarray, y: np.ndarray, half: float, radius: float) -> np.ndarray:
    """Signed distance to a capsule along x; negative inside."""
    return np.hypot(x - np.clip(x, -half, half), y) - radius


def _cover(distance: np.ndarray, size: int) -> np.ndarray:
    """Share of each pixel inside a shape, taken from the signed distance at its centre."""
    return np.clip(0.5 - distance * size, 0, 1)


def _paint(canvas: np.ndarray, cover: np.ndarray, tone: np.ndarray) -> None:
    canvas += cover[..., None] * (tone - canvas)


def _mix(first: np.ndarray, second: np.ndarray, share: float | np.ndarray) -> np.ndarray:
    return first + share * (second - first)
