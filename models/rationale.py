"""LCR's fitting branch: a predicted map of where the loss of an image hangs."""

import torch
from torch import Tensor, nn


class RationaleBranch(nn.Module):
    """A bias-free 1x1 convolution to `channels`, BatchNorm, ReLU, the maximum over channels,
    scaled to [0, 1] for each image (LCR, Shu et al. 2023; that scale for each image is ours).
    """

    def __init__(self, dim: int, channels: int = 32) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(dim, channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, patch_features: Tensor) -> Tensor:
        """Patch features [R, N, D] -> predicted map [R, N], float32 in [0, 1].

        Of an image whose cells are all alike it is 0.
        """
        # A 1x1 convolution knows no neighbours: the map may be one row.
        rows = patch_features.transpose(1, 2)[:, :, None]
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(self.conv.weight.dtype)
            highest = self.norm(self.conv(rows)).relu().amax(dim=1)[:, 0]  # [R, N]
            # Not aminmax, which has no gradient in torch 2.11.
            low, high = highest.amin(dim=1, keepdim=True), highest.amax(dim=1, keepdim=True)
            return (highest - low) / (high - low).clamp_min(1e-6)


def rationale_weights(predicted: Tensor) -> Tensor:
    """A predicted map [R, N] as weights of an average: rows sum to 1; uniform where it is 0."""
    total = predicted.sum(dim=1, keepdim=True)
    return torch.where(total > 0, predicted / total.clamp_min(1e-6), 1 / predicted.shape[1])
