"""Multi-crop augmentation (SwAV; DINO, arXiv:2104.14294; EsViT, arXiv:2106.09785)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from utils.normalisation import IMAGENET, Normalisation
from utils.seeding import AUGMENTATION, derive_seed


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of image `index` in epoch `epoch` of the run seeded with `seed`."""
    return derive_seed(seed, AUGMENTATION, epoch, index)


def _gaussian_blur(image: Image.Image) -> Image.Image:
    """PIL's, with a radius (the kernel's sigma, in pixels) uniform in (0.1, 2)."""
    radius = torch.empty(1).uniform_(0.1, 2.0).item()
    return image.filter(ImageFilter.GaussianBlur(radius))


def normalised(pixels: Tensor, by: Normalisation = IMAGENET) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 of the same shape.

    On the CPU the bits of torchvision's `Normalize`; on a GPU nothing waits for the host.
    """
    x = pixels.float().mul_(1 / 255)
    for channel, mean, std in zip(x.unbind(-3), *by, strict=True):
        channel.sub_(mean).div_(std)
    return x


def _to_normalised_tensor(by: Normalisation) -> list[nn.Module]:
    return [v2.PILToTensor(), v2.Lambda(partial(normalised, by=by))]


def default_resize(size: int) -> int:
    """Pixels of the shorter side from which the field cuts a centre of `size`: 256 for 224."""
    return round(size * 256 / 224)


def eval_transform(size: int, resize: int, by: Normalisation = IMAGENET) -> v2.Compose:
    """PIL RGB image -> float32 [3, size, size], normalised: the centre of the resized image.

    The shorter side becomes `resize` pixels, bicubic.
    """
    return v2.Compose(
        [
            v2.Resize(resize, interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            *_to_normalised_tensor(by),
        ]
    )


def _seeded(augment: Callable, image: Image.Image, seed: int) -> Tensor:
    """Augment after seeding the global generator, which the caller has forked."""
    # torch.manual_seed would also reseed the accelerators, which are not forked.
    torch.default_generator.manual_seed(seed)
    return augment(image)


class RandomCrop:
    """The linear probe's training view [esvit]: a random resized crop and a flip.

    Scale (0.08, 1) of the area, bilinear; flip 0.5; `size` pixels a side.
    """

    def __init__(self, size: int = 224, by: Normalisation = IMAGENET) -> None:
        self._augment = v2.Compose(
            [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *_to_normalised_tensor(by)]
        )

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """PIL RGB image -> float32 [3, size, size]; `seed` alone decides every draw."""
        with torch.random.fork_rng(devices=[]):
            return _seeded(self._augment, image, seed)


class View(NamedTuple):
    """How one crop of an image is made.

    place: (group, number in the group), which seeds it: the global crops are group 0, each local
    size is a group. size: pixels of a side. scale: from, to, in shares of the image's area.
    """

    place: tuple[int, int]
    size: int
    scale: Sequence[float]
    blur_prob: float
    solarise_prob: float = 0.0


@dataclass(frozen=True)
class Augmentation:
    """Sizes and probabilities of the multi-crop augmentation; the defaults are DINO's.

    `local_crops_number` and `local_crops_size` have one entry per local size; () gives none.
    Scales are shares of the image's area. `color_jitter` is (brightness, contrast, saturation,
    hue). `blur_prob` is for (first global, second global, local) crops; `solarise_prob` for the
    second global crop only.
    """

    global_crops_size: int = 224
    global_crops_scale: Sequence[float] = (0.4, 1.0)
    local_crops_number: Sequence[int] = (8,)
    local_crops_size: Sequence[int] = (96,)
    local_crops_scale: Sequence[float] = (0.05, 0.4)
    color_jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1)
    color_jitter_prob: float = 0.8
    grey_prob: float = 0.2
    flip_prob: float = 0.5
    solarise_prob: float = 0.2
    blur_prob: Sequence[float] = (1.0, 0.1, 0.5)
    normalisation: Normalisation = IMAGENET

    @property
    def views(self) -> list[View]:
        """The crops in the order in which they come: two global ones, then the local ones."""
        blur_first, blur_second, blur_local = self.blur_prob
        whole = (self.global_crops_size, self.global_crops_scale)
        views = [
            View((0, 0), *whole, blur_first),
            View((0, 1), *whole, blur_second, self.solarise_prob),
        ]
        local = zip(self.local_crops_number, self.local_crops_size, strict=True)
        for group, (number, size) in enumerate(local, start=1):
            for i in range(number):
                views.append(View((group, i), size, self.local_crops_scale, blur_local))
        return views

    @property
    def sizes(self) -> list[int]:
        """The side of every crop in pixels."""
        return [view.size for view in self.views]


class MultiCrop:
    """Two global crops and several local crops of one image, augmented as in DINO."""

    def __init__(self, settings: Augmentation) -> None:
        jitter = v2.ColorJitter(*settings.color_jitter)

        def crop(view: View) -> v2.Compose:
            return v2.Compose(
                [
                    v2.RandomResizedCrop(
                        view.size, scale=tuple(view.scale), interpolation=InterpolationMode.BICUBIC
                    ),
                    v2.RandomHorizontalFlip(settings.flip_prob),
                    v2.RandomApply([jitter], settings.color_jitter_prob),
                    v2.RandomGrayscale(settings.grey_prob),
                    v2.RandomApply([v2.Lambda(_gaussian_blur)], view.blur_prob),
                    v2.RandomSolarize(threshold=128, p=view.solarise_prob),
                    v2.PILToTensor(),
                ]
            )

        self._crops = [(view.place, crop(view)) for view in settings.views]

    def __call__(self, image: Image.Image, seed: int) -> list[Tensor]:
        """PIL RGB image -> uint8 [3, S, S] per crop: the two global crops, then the local ones.

        They are to be `normalised` where they are needed: a quarter of the bytes on the way there.
        `seed` (see `sample_seed`) alone decides every draw; each crop has a stream of its own.
        """
        with torch.random.fork_rng(devices=[]):
            return [_seeded(crop, image, derive_seed(seed, *place)) for place, crop in self._crops]
