"""Gated attention pooling: patches are instances, the image is the bag.

The gated form of Ilse, Tomczak & Welling 2018, on region-head embeddings.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedAttentionPool(nn.Module):
    """a_n = softmax_n( w.( tanh(A u'_n + alpha) * sigmoid(B u'_n + beta) ) + b ), u' = sqrt(d) u.

    Embeddings u are unit vectors; scaled by sqrt(d) their coordinates have unit variance,
    without which the gate would stay dead (ours). Computed in float32.
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.tanh = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Patch embeddings [R, N, d] -> log attention [R, N]; exp of each row sums to 1."""
        with torch.autocast(embeddings.device.type, enabled=False):
            scaled = math.sqrt(embeddings.shape[-1]) * embeddings.to(self.score.weight.dtype)
            gated = torch.tanh(self.tanh(scaled)) * torch.sigmoid(self.gate(scaled))
            return F.log_softmax(self.score(gated).squeeze(-1), dim=-1)


def pooled(patches: Tensor, log_attention: Tensor) -> Tensor:
    """The bag's feature [R, D]: the sum of patches [R, N, D] by exp of log_attention [R, N]."""
    return torch.einsum("rn,rnd->rd", log_attention.exp().to(patches.dtype), patches)
