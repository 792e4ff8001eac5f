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

    def forward(self, embeddings: Tensor) -> Tensor:
        """Patch embeddings [R, N, d] -> log attention [R, N]; exp of each row sums to 1."""
        with torch.autocast(embeddings.device.type, enabled=False):
            scaled = math.sqrt(embeddings.shape[-1]) * embeddings.to(self.score.weight.dtype)
            gated = torch.tanh(self.tanh(scaled)) * torch.sigmoid(self.gate(scaled))
            return F.log_softmax(self.score(gated).squeeze(-1), dim=-1)


def bag_embedding(embeddings: Tensor, log_attention: Tensor) -> Tensor:
    """Attention-weighted sum of patches, brought back to the sphere.

    embeddings [R, N, d], log_attention [R, N] -> [R, d]. On the sphere a temperature means
    the same for a bag as for an image (ours).
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.normalize(torch.einsum("rn,rnd->rd", log_attention.exp(), embeddings), dim=-1)
