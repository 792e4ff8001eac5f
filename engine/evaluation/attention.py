"""Where a network looks: its maps over the patches of an image, by one name each.

mil         the pooling's attention (models/mil.py), of runs of the objective cmd
lcr         the fitting branch's predicted map (models/rationale.py), of the objective lcr
self        the last block's [CLS]-to-patch self-attention, mean of heads; ViT
similarity  softmax over the patches of cos(patch feature, image feature) / 0.1; always there. Where
            the two have not one width, the patches' mean takes the image feature's place
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.network import Network
from models.rationale import rationale_weights
from models.vit import ViT

# In words, for pictures and tables.
NAMES = {
    "mil": "MIL attention",
    "lcr": "LCR map",
    "self": "[CLS] self-attention",
    "similarity": "Similarity",
}
# The student's temperature in the losses; ours. Cosines lie within 1, so at 1 all maps are flat.
SIMILARITY_TEMPERATURE = 0.1


def kinds(network: Network) -> list[str]:
    """Which of NAMES the network has, in that order."""
    has = {
        "mil": network.pool is not None,
        "lcr": network.rationale is not None,
        "self": isinstance(network.backbone, ViT),
        "similarity": True,
    }
    return [kind for kind in NAMES if has[kind]]


@torch.no_grad()
def attention_map(network: Network, images: Tensor, kind: str) -> Tensor:
    """The map `kind` over the patches of each image: [B, N] float32, row-major, rows sum to 1.

    network: in eval mode. images: [B, 3, S, S], normalised, on the network's device. An lcr map
    that is zero everywhere, of an image whose patches are all alike, is the uniform one. Raises
    ValueError for a kind that the network does not have; see `kinds`.
    """
    if kind not in kinds(network):
        raise ValueError(f"the network has no map '{kind}'; it has: {', '.join(kinds(network))}")
    if kind == "self":
        maps = network.backbone.class_attention(images).mean(dim=1)
        return maps / maps.sum(dim=1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    image_feature, patch_features = network.backbone(images)
    if kind == "similarity":
        if image_feature.shape[1] != patch_features.shape[2]:
            image_feature = patch_features.mean(dim=1)
        image = F.normalize(image_feature.float(), dim=-1)
        patches = F.normalize(patch_features.float(), dim=-1)
        cosines = torch.einsum("bd,bnd->bn", image, patches)
        return (cosines / SIMILARITY_TEMPERATURE).softmax(dim=1)
    return over_patches(network, patch_features, kind).float()


def over_patches(network: Network, patch_features: Tensor, kind: str) -> Tensor:
    """The map `mil` or `lcr` over patch features [B, N, D]: [B, N], rows sum to 1."""
    if kind == "mil":
        return network.pool(patch_features).exp()
    return rationale_weights(network.rationale(patch_features))
