"""Multi-crop augmentation of a whole batch on the device of its pixels (ours).

Statistically the same as `datasets.multicrop.MultiCrop`, which makes the crops of one image at a
time with PIL: the same operations in the same order, with parameters of the same distributions, but
not the same crops from the same seed. What a draw decides is decided on the host for the whole
batch (`CROP`): the device is never asked anything, and an operation runs on the crops that have it.

Values stay float32 in 0..255 until the end; PIL rounds to a whole grey level after every operation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from datasets.multicrop import Augmentation
from utils.normalisation import Normalisation
from utils.seeding import derive_seed

RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
BLUR_RADIUS = (0.1, 2.0)
BLUR_PASSES = 3
# A whole grey level of 128 or more is a value of at least this before rounding.
SOLARISE_THRESHOLD = 127.5
LUMA = (0.299, 0.587, 0.114)
# Elements of the largest tensor of one chunk of crops: on the CPU what stays in its cache, on
# an accelerator what keeps memory in bounds.
CHUNK_ELEMENTS = {"cpu": 2**18, "accelerator": 2**26}

# The uniform numbers that decide one crop, in the order in which `draw` gives them.
DRAWS = np.dtype(
    [
        ("area", np.float64, ATTEMPTS),
        ("ratio", np.float64, ATTEMPTS),
        ("top", np.float64),
        ("left", np.float64),
        ("flip", np.float64),
        ("jitter", np.float64),
        ("strengths", np.float64, 4),
        ("order", np.float64, 4),
        ("grey", np.float64),
        ("blur", np.float64),
        ("radius", np.float64),
        ("solarise", np.float64),
    ]
)
NUMBER_OF_DRAWS = DRAWS.itemsize // 8
# What they decide.
CROP = np.dtype(
    [
        ("top", np.int64),  # the box in whole source pixels
        ("left", np.int64),
        ("height", np.int64),
        ("width", np.int64),
        ("flipped", bool),
        ("jittered", bool),
        # Factors of brightness, contrast and saturation and the shift of hue in turns; then those
        # four operations by number, in the order in which they are applied.
        ("strengths", np.float64, 4),
        ("order", np.int64, 4),
        ("grey", bool),
        ("radius", np.float64),  # sigma of the blur in pixels, 0 for none
        ("solarised", bool),
    ]
)


@dataclass
class Images:
    """A batch of images of different sizes.

    `pixels` is uint8 [B, 3, H, W] with each image in the top left corner and anything in
    the rest; `sizes` holds each image's (height, width) on the host.
    """

    pixels: Tensor
    sizes: Sequence[tuple[int, int]]


class BatchedMultiCrop:
    """`MultiCrop` for a batch at once."""

    def __init__(self, settings: Augmentation) -> None:
        self._settings, self.sizes, views = settings, settings.sizes, settings.views
        self._places = [view.place for view in views]
        self._scale = np.array([view.scale for view in views], dtype=np.float64)
        self._blur_prob = np.array([view.blur_prob for view in views])
        self._solarise_prob = np.array([view.solarise_prob for view in views])
        jitter = v2.ColorJitter(*settings.color_jitter)
        # ColorJitter has None for a range that changes nothing.
        self._strengths = np.array(
            [part or (1, 1) for part in (jitter.brightness, jitter.contrast, jitter.saturation)]
            + [jitter.hue or (0, 0)]
        )

    def draw(self, seed: int) -> Tensor:
        """Every random number of one image, by `sample_seed`: float32 [V, D], uniform in [0, 1).

        Each crop has a stream of its own, and D does not depend on the options.
        """
        draws = torch.empty(len(self._places), NUMBER_OF_DRAWS)
        generator = torch.Generator()
        for row, place in zip(draws, self._places, strict=True):
            row.uniform_(generator=generator.manual_seed(derive_seed(seed, *place)))
        return draws

    def parameters(self, sizes: Sequence[tuple[int, int]], draws: Tensor) -> np.recarray:
        """What `draws`, float32 [B, V, D], decide for images of `sizes`: `CROP` [B, V]."""
        u = draws.numpy().astype(np.float64, order="C").view(DRAWS)[..., 0]
        height, width = np.asarray(sizes, dtype=np.int64).T[..., None]
        crops = np.recarray(u.shape, CROP)
        crops.top, crops.left, crops.height, crops.width = _random_boxes(
            height, width, self._scale, u
        )
        crops.flipped = u["flip"] < self._settings.flip_prob
        crops.jittered = u["jitter"] < self._settings.color_jitter_prob
        crops.strengths = _between(self._strengths, u["strengths"])
        crops.order = u["order"].argsort(axis=-1)
        crops.grey = u["grey"] < self._settings.grey_prob
        radius = _between(np.array(BLUR_RADIUS), u["radius"])
        crops.radius = np.where(u["blur"] < self._blur_prob, radius, 0.0)
        crops.solarised = u["solarise"] < self._solarise_prob
        return crops

    def __call__(self, images: Images, draws: Tensor) -> list[Tensor]:
        """-> normalised float32 [B, 3, S, S] per crop, on the device of `images.pixels`.

        draws: float32 [B, V, D] on the host, by `draw`. Nothing waits for the device. A crop
        depends on its own image and draws alone, but for the rounding of products on a GPU.
        """
        parameters = self.parameters(images.sizes, draws)
        crops = []
        for size, group in groupby(self.sizes):
            views = len(list(group))
            of_size = parameters[:, len(crops) : len(crops) + views].T.ravel()
            made = _crops_of_one_size(images, of_size, size, self._settings.normalisation)
            crops += made.unflatten(0, (views, -1)).unbind()
        return crops


def _between(bounds: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Numbers uniform in [0, 1) -> uniform between `bounds` [..., 2]."""
    return bounds[..., 0] + (bounds[..., 1] - bounds[..., 0]) * u


def _random_boxes(
    height: np.ndarray, width: np.ndarray, scale: np.ndarray, u: np.ndarray
) -> tuple[np.ndarray, ...]:
    """(top, left, height, width), each int64 [B, V], as torchvision's RandomResizedCrop.

    `height` and `width` of the images are [B, 1]; `scale` [V, 2]. The first of ten boxes that
    fits is taken; if none does, the largest central one of an allowed ratio.
    """
    area = (height * width)[..., None] * _between(scale[:, None], u["area"])
    ratio = np.exp(_between(np.log(RATIO), u["ratio"]))
    tried_w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    tried_h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (tried_w > 0) & (tried_w <= width[..., None])
    fits &= (tried_h > 0) & (tried_h <= height[..., None])
    first = fits.argmax(axis=-1)[..., None]
    found = fits.any(axis=-1)
    central_w = np.minimum(width, np.rint(height * RATIO[1]).astype(np.int64))
    central_h = np.minimum(height, np.rint(width / RATIO[0]).astype(np.int64))
    box_w = np.where(found, np.take_along_axis(tried_w, first, -1)[..., 0], central_w)
    box_h = np.where(found, np.take_along_axis(tried_h, first, -1)[..., 0], central_h)
    free_h, free_w = height - box_h, width - box_w
    top = np.where(found, (u["top"] * (free_h + 1)).astype(np.int64), free_h // 2)
    left = np.where(found, (u["left"] * (free_w + 1)).astype(np.int64), free_w // 2)
    return top, left, box_h, box_w


def _crops_of_one_size(
    images: Images, parameters: np.recarray, size: int, by: Normalisation
) -> Tensor:
    """float32 [N, 3, size, size], normalised; crop n is of image n modulo B."""
    pixels, number = images.pixels, len(parameters.top)
    if pixels.device.type == "cpu":
        resize, elements, limit = resize_one_by_one, 3 * size**2, CHUNK_ELEMENTS["cpu"]
    else:
        height, width = pixels.shape[2:]
        elements, limit = 3 * max(height, size) * max(width, size), CHUNK_ELEMENTS["accelerator"]
        resize = resize_by_products
    chunk = max(1, limit // elements)
    crops = torch.empty(number, 3, size, size, device=pixels.device)
    for start in range(0, number, chunk):
        part = slice(start, start + chunk)
        of_part = parameters[part]
        source = np.arange(number)[part] % len(images.sizes)
        x = _augmented(resize(pixels, source, of_part, size), of_part)
        for channel, (mean, std) in enumerate(zip(*by, strict=True)):
            torch.sub(x[:, channel], 255 * mean, out=crops[part, channel]).div_(255 * std)
    return crops


def resize_one_by_one(pixels: Tensor, source: np.ndarray, boxes: np.recarray, size: int) -> Tensor:
    """The `boxes` of the images `source` [N], resized and flipped: float32 [N, 3, size, size].

    Values are in 0..255. torch's own resize of uint8 is PIL's. It is far faster on the CPU than
    `resize_by_products`; on an accelerator it would start several kernels a crop.
    """
    crops = torch.empty(len(source), 3, size, size, device=pixels.device)
    for crop, n, box in zip(crops, source, boxes, strict=True):
        rows = slice(box.top, box.top + box.height)
        columns = slice(box.left, box.left + box.width)
        part = pixels[n : n + 1, :, rows, columns].contiguous()
        part = F.interpolate(part, (size, size), mode="bicubic", antialias=True)[0]
        crop.copy_(part.flip(-1) if box.flipped else part)
    return crops


def resize_by_products(pixels: Tensor, source: np.ndarray, boxes: np.recarray, size: int) -> Tensor:
    """The same by two matrix products a crop, across and then down.

    Each product is cut to the range of uint8, as bicubic weights overshoot. On an accelerator
    the products are in float16, which holds pixels exactly and weights to 11 bits.
    """
    device = pixels.device
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    top, left = boxes.top.min(), boxes.left.min()
    bottom, right = (boxes.top + boxes.height).max(), (boxes.left + boxes.width).max()
    window = pixels[:, :, top:bottom, left:right]
    window = window.index_select(0, _to_device(source, device)).to(dtype)
    across = _bicubic_matrix(boxes.left - left, boxes.width, right - left, size, device)
    across = torch.where(_to_device(boxes.flipped, device).view(-1, 1, 1), across.flip(1), across)
    down = _bicubic_matrix(boxes.top - top, boxes.height, bottom - top, size, device)
    across, down = across.to(dtype)[:, None], down.to(dtype)[:, None]
    columns = (across @ window.transpose(2, 3)).clamp_(0, 255)
    return (down @ columns.transpose(2, 3)).clamp_(0, 255).float()


def _bicubic_matrix(
    start: np.ndarray, length: np.ndarray, extent: int, size: int, device: torch.device
) -> Tensor:
    """PIL's antialiased bicubic weights along one axis: float32 [N, size, extent].

    Row i holds the weights of output i: of `extent` pixels, those from `start` [N] to
    `start + length` are resized to `size`; the others have weight 0, as after a crop.
    """
    reach = 2 * math.ceil(2 * max(1.0, length.max() / size)) + 1
    start = _to_device(start, device).view(-1, 1, 1)
    length = _to_device(length.astype(np.float32), device).view(-1, 1, 1)
    scale = length / size
    stretch = scale.clamp(min=1)
    centre = (torch.arange(size, device=device).view(1, -1, 1) + 0.5) * scale
    # The first pixel within 2 * stretch of the centre, and the most that can follow.
    pixel = (centre - 2 * stretch + 0.5).floor().clamp(min=0) + torch.arange(reach, device=device)
    weights = _bicubic((pixel + 0.5 - centre) / stretch) * (pixel < length)
    weights /= weights.sum(dim=-1, keepdim=True)
    # The last rows' pixels may run past the end, with weight 0.
    matrix = torch.zeros(len(length), size, extent + reach, device=device)
    return matrix.scatter_(2, pixel.long() + start, weights)[..., :extent]


def _bicubic(x: Tensor) -> Tensor:
    """The bicubic kernel with a = -1/2 (Keys 1981, eq. 15), which is 0 from |x| = 2 on."""
    x = x.abs().clamp(max=2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array on the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _augmented(x: Tensor, parameters: np.recarray) -> Tensor:
    """Colour jitter, grey, blur and solarise: float32 [N, 3, S, S] in 0..255; changes `x`."""
    nothing = np.empty((len(x), 0))
    steps = [
        (operation, parameters.jittered & (order == number), parameters.strengths[:, number])
        for order in parameters.order.T
        for number, operation in enumerate(JITTER)
    ]
    steps += [
        (_grey, parameters.grey, nothing),
        (_blur, parameters.radius > 0, _box_weights(parameters.radius)),
        (_solarise, parameters.solarised, nothing),
    ]
    steps = [(step, np.flatnonzero(on), values[on]) for step, on, values in steps if on.any()]
    if not steps:
        return x
    # One transfer of all indices and one of all arguments.
    operations, chosen, arguments = zip(*steps, strict=True)
    indices = _to_device(np.concatenate(chosen), x.device).split([len(c) for c in chosen])
    flat = np.concatenate([a.ravel() for a in arguments]).astype(np.float32)
    values = _to_device(flat, x.device).split([a.size for a in arguments])
    for operation, index, value in zip(operations, indices, values, strict=True):
        if len(index) == len(x):
            x = operation(x, value)
        else:
            x.index_copy_(0, index, operation(x[index], value))
    return x


def _luma(x: Tensor) -> Tensor:
    """PIL's grey of every pixel: [N, 3, S, S] -> [N, 1, S, S]."""
    red, green, blue = x.split(1, dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _blend(x: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(reference, x, factor.view(-1, 1, 1, 1)).clamp_(0, 255)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 255)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _luma(x.mean(dim=(2, 3), keepdim=True)), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _luma(x), factor)


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue and keeps value and chroma, the coordinates of HSV (Smith 1978).

    On the hexagonal circle of hues, 0..6 with red at 0, green at 2 and blue at 4, a channel is
    at its highest within 1 of its own hue, at its lowest from 2 on, and linear between.
    """
    red, green, blue = x.split(1, dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    hue = torch.where(
        red == high,
        green - blue,
        torch.where(
            green == high, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
        ),
    )
    # A grey pixel has no hue: any will do, as its chroma is 0.
    hue = hue.div_(chroma.clamp(min=1e-6)).add_(6 * turns.view(-1, 1, 1, 1))
    distance = hue - torch.arange(0, 6, 2, device=x.device).view(1, 3, 1, 1)
    # The difference, -8 to 8, becomes the distance on the circle, 0 to 3.
    distance = distance.abs_().sub_(3).abs_().sub_(3).abs_()
    return torch.addcmul(high, distance.sub_(1).clamp_(0, 1), chroma, value=-1)


JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_brightness, _contrast, _saturation, _hue)


def _grey(x: Tensor, _: Tensor) -> Tensor:
    return x.copy_(_luma(x))


def _solarise(x: Tensor, _: Tensor) -> Tensor:
    return torch.where(x < SOLARISE_THRESHOLD, x, 255 - x)


def _box_weights(radius: np.ndarray) -> np.ndarray:
    """The extended box filter of which PIL's blur of sigma `radius` [N] makes three passes.

    Gwosdek et al. 2011, eq. 11-14 -> float64 [N, 2 or 3]: the weights of the pixel itself, of
    its two neighbours, and of theirs where any filter reaches so far.
    """
    variance = radius**2 / BLUR_PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    edge /= 6 * (variance - (whole + 1) ** 2)
    extent = (whole + edge)[:, None]
    distance = np.arange(whole.max(initial=0) + 2)
    return np.clip(extent + 1 - distance, 0, 1) / (2 * extent + 1)


def _blur(x: Tensor, weights: Tensor) -> Tensor:
    """Each crop with its own box filter, three times across and three times down.

    Before each pass the border pixels are repeated outwards, as PIL does.
    """
    weights = weights.view(len(x), -1, 1, 1, 1)
    reach = weights.shape[1] - 1
    size = x.shape[-1]
    for dim, padding in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        for _ in range(BLUR_PASSES):
            padded = F.pad(x, padding, mode="replicate")
            x = x * weights[:, 0]
            for i in range(1, reach + 1):
                sides = padded.narrow(dim, reach - i, size) + padded.narrow(dim, reach + i, size)
                x.addcmul_(sides, weights[:, i])
    return x
