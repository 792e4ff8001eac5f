"""ResNet-50 (He et al. 2016), torchvision's, as a backbone with patch features."""

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from models.backbone import Backbone, check_depth


class ResNet(Backbone):
    """ResNet-50. The patch features are the last feature map's cells, the image feature their mean.

    Parameters carry torchvision's names, without the classifier. Sides need not be multiples
    of the stride: convolutions round the map up.
    """

    num_features = 2048
    stride = 32
    patch_size = 1

    def __init__(self) -> None:
        super().__init__()
        network = resnet50(weights=None)
        for name, module in network.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)
        # Channels last: a fifth faster, measured on a CPU; what convolutions on GPUs want too.
        self.to(memory_format=torch.channels_last)

    def _block_outputs(self, images: Tensor):
        """Yield the map [B, C, H, W] after every residual block."""
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for block in self.all_blocks():
            x = block(x)
            yield x

    def all_blocks(self) -> list[nn.Module]:
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        for x in self._block_outputs(images):  # noqa: B007 - the last one is wanted
            pass
        patches = x.flatten(2).transpose(1, 2)
        return patches.mean(dim=1), patches

    def last_blocks(
        self, images: Tensor, n: int, avgpool_patchtokens: bool = False
    ) -> tuple[Tensor, ...]:
        check_depth(n, len(self.all_blocks()))
        return tuple(x.mean(dim=(2, 3)) for x in list(self._block_outputs(images))[-n:])
