"""Gated attention over patches: patches are instances, the image is the bag.

The gated form of Ilse, Tomczak & Welling 2018, on patch features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedAttention(nn.Module):
    """a_n = softmax_n( w.( tanh(A x'_n + alpha) * sigmoid(B x'_n + beta) ) + b ).

    x' = sqrt(D) x / |x| has coordinates of unit variance, whatever the scale of a backbone's
    features. w and b start at 0, and so the attention even (ours). Computed in float32.
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.tanh = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch features [R, N, D] -> log attention [R, N]; exp of each row sums to 1."""
        with torch.autocast(patches.device.type, enabled=False):
            patches = F.normalize(patches.to(self.score.weight.dtype), dim=-1)
            patches = patches * math.sqrt(patches.shape[-1])
            gated = torch.tanh(self.tanh(patches)) * torch.sigmoid(self.gate(patches))
            return F.log_softmax(self.score(gated).squeeze(-1), dim=-1)
