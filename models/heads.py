"""Heads on a backbone's features: DINO's (Caron et al. 2021) and MoCo v2's (Chen et al. 2020).

DINO's gives embeddings and prototypes apart: a caller that needs logits multiplies the two; a
loss that can do without never holds them.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """K weight-normed rows in R^d: W = g * v / |v|, the last layer of the head.

    Parameters `weight_g` [K, 1] and `weight_v` [K, d] carry the names of the reference's
    weight norm. Directions keep nn.Linear's default initialisation; g = 1.
    norm_last_layer: freeze the magnitudes g.
    """

    def __init__(self, dim: int, count: int, norm_last_layer: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())

    def forward(self) -> Tensor:
        """The prototypes W [K, d], float32."""
        # The kernel under torch's own weight norm: one pass over K x d, and one for its gradient.
        return torch._weight_norm(self.weight_v.float(), self.weight_g.float(), 0)


class DINOHead(nn.Module):
    """DINO's head, or MoCo v2's: an MLP, then the unit sphere; prototypes beside it.

    layers: linears in the MLP, in_dim -> hidden -> ... -> bottleneck, 3 by default, GELU between.
    They are trunc_normal(0.02) with zero bias; `use_bn` puts a BatchNorm after each but the last.
    out_dim: prototypes; 0 for none, where the embeddings meet another head's. projects: MoCo v2's
    projection (it has 2 linears), with ReLU, PyTorch's initialisation and no prototypes.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        projects: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (layers - 1) + [bottleneck_dim]
        modules: list[nn.Module] = []
        for index, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            modules.append(nn.Linear(narrow, wide))
            if index < layers - 1:
                if use_bn:
                    modules.append(nn.BatchNorm1d(hidden_dim))
                modules.append(nn.ReLU() if projects else nn.GELU())
        self.mlp = nn.Sequential(*modules)
        for module in () if projects else modules:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        count = 0 if projects else out_dim
        self.last_layer = Prototypes(bottleneck_dim, count, norm_last_layer) if count else None

    def forward(self, features: Tensor) -> Tensor:
        """Features [..., in_dim] -> embeddings [..., bottleneck] on the unit sphere, float32."""
        shape = features.shape[:-1]
        embeddings = self.mlp(features.flatten(0, -2))
        return F.normalize(embeddings.float(), dim=-1).unflatten(0, shape)

    def prototypes(self) -> Tensor | None:
        """W [K, bottleneck], float32; logits are embeddings @ W.T. None where there are none."""
        return None if self.last_layer is None else self.last_layer()
