"""What a network makes of one batch of crops: the hand-over from models to losses."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps

import torch
from torch import Tensor


@dataclass
class Views:
    """All crops of a batch as seen by one network.

    B images, V crops, d the embedding width, D the feature width, K prototypes. Rows are
    crop-major: all B images of crop 1, then crop 2, ... Lists have one entry for each run
    of equally sized crops, in the order of the crops: [V_g * B, N_g, ...].

    batch: B.
    image_features [V*B, D]; image_embeddings [V*B, d]; image_prototypes [K, d].
    patch_features: [V_g*B, N_g, D]; patch_embeddings: [V_g*B, N_g, d]; region_prototypes [K, d].
    log_attention: [V_g*B, N_g]; instance_embeddings: patches by the image head [V_g*B, N_g, d].
    predicted_map: [V*B, N], LCR's, of crops of one size.
    bag_embeddings: image features by the bag head [V*B, d].
    Features are of the backbone's precision under autocast, all else is float32. What the network
    was not built for is None or empty.
    """

    batch: int
    image_embeddings: Tensor
    image_prototypes: Tensor | None = None
    image_features: Tensor | None = None
    patch_features: list[Tensor] = field(default_factory=list)
    patch_embeddings: list[Tensor] = field(default_factory=list)
    region_prototypes: Tensor | None = None
    log_attention: list[Tensor] = field(default_factory=list)
    instance_embeddings: list[Tensor] = field(default_factory=list)
    predicted_map: Tensor | None = None
    bag_embeddings: Tensor | None = None

    @property
    def count(self) -> int:
        """V, the number of crops."""
        return len(self.image_embeddings) // self.batch


def in_full_precision(function: Callable) -> Callable:
    """Decorator: autocast is off inside a function whose first argument is a Views or a tensor.

    Half-precision logits and similarities are too coarse at a teacher's temperature.
    """

    @wraps(function)
    def wrapper(first, *args, **kwargs):
        tensor = first.image_embeddings if isinstance(first, Views) else first
        with torch.autocast(tensor.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapper
