"""How pixels become a network's input: by the mean and the deviation of its training images."""

from typing import NamedTuple

from torch import Tensor


class Normalisation(NamedTuple):
    """Mean and standard deviation of red, green and blue, as shares of the brightest value."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        numbers = (", ".join(f"{value:g}" for value in values) for values in self)
        return "mean {}, deviation {}".format(*numbers)

    def of_imagenets(self, images: Tensor) -> Tensor:
        """Images [..., 3, H, W] that ImageNet's normalisation made, by this one instead."""
        if self == IMAGENET:
            return images
        numbers = (images.new_tensor(values).view(3, 1, 1) for values in (*IMAGENET, *self))
        mean, std, own_mean, own_std = numbers
        return (images * std + (mean - own_mean)) / own_std


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
