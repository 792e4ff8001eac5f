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
    total = distributed.size() * len(crops)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    views = network([distributed.permuted(crops, order)])
    # Both at once: the wider of their types holds the values of each.
    features, embeddings = views.image_features, views.image_embeddings
    both = distributed.permuted(torch.cat([features, embeddings], dim=1), order.argsort())
    features, embeddings = both.split([features.shape[1], embeddings.shape[1]], dim=1)
    return replace(views, image_features=features, image_embeddings=embeddings, patch_features=[])
