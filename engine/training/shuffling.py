"""Keys of shuffled batches: BatchNorm's statistics must not give away which key is whose.

With groups of a batch normalised apart (models/grouped_norm.py), a query and its key in the same
group share their group's statistics, by which the student could know the key without looking at
the image (MoCo, He et al. 2020, section 3.3). So the keys' groups are drawn anew in every step,
from the images of all processes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from models.network import Network
from utils import distributed
from utils.seeding import SHUFFLING, derive_seed
from utils.views import Views


def shuffling_seed(seed: int, step: int, micro: int) -> int:
    """Seed of the order of one micro-batch's keys, the same on all processes."""
    return derive_seed(seed, SHUFFLING, step, micro)


def shuffled(network: Network, crops: Tensor, seed: int) -> Views:
    """The network's image features and embeddings of crops [B, 3, S, S], grouped at random.

    seed: the same on all processes. Row b is of crop b, as if the crops had not moved. No
    gradient; patch features, whose rows stay where they were computed, are left out.
    """
    everyone = distributed.gather(crops)
    order = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(seed))
    order = order.to(crops.device, non_blocking=True)
    batch = len(crops)
    first = distributed.position() * batch
    views = network([everyone[order[first : first + batch]]])
    back = order.argsort()[first : first + batch]
    return replace(
        views,
        image_features=distributed.gather(views.image_features)[back],
        image_embeddings=distributed.gather(views.image_embeddings)[back],
        patch_features=[],
    )
