"""What every backbone gives: the interface the rest of the project relies on."""

from abc import abstractmethod

from torch import Tensor, nn

from utils.normalisation import IMAGENET, Normalisation


class Backbone(nn.Module):
    """Images -> (image feature, patch features) at any size the stride allows.

    num_features: D, the width of the image feature.
    mean_of_patches: whether the image feature is the mean of the patch features.
    stride: pixels per patch cell along each side.
    patch_size: the multiple (pixels) that each side of an input image must be.
    window_size: Swin's attention window in patches; 0 for other families.
    normalisation: of the images that the weights were trained with; who reads them says it.
    """

    num_features: int
    stride: int
    patch_size: int
    window_size: int = 0
    mean_of_patches: bool = True
    normalisation: Normalisation = IMAGENET

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] float -> image feature [B, D] and patch features [B, N, P], row-major."""

    @property
    def num_patch_features(self) -> int:
        """P, the width of the patch features: D in most."""
        return self.num_features

    def shared(self, calls: int) -> list[tuple]:
        """For each of `calls` forwards with the same weights, its other arguments.

        What does not depend on the images is computed here, once for all of them.
        """
        return [()] * calls

    @abstractmethod
    def last_blocks(
        self, images: Tensor, n: int, avgpool_patchtokens: bool = False
    ) -> tuple[Tensor, ...]:
        """One feature [B, D_i] for each of the last `n` blocks, in the order of the network.

        Concatenated, they are the linear probe's input (EsViT's protocol).
        `avgpool_patchtokens` appends the average of the last block's patches, where the image
        feature is not that already.
        """

    @property
    def depth(self) -> int:
        """How many blocks `last_blocks` can give."""
        return len(self.all_blocks())

    @abstractmethod
    def all_blocks(self) -> list[nn.Module]:
        """The residual blocks, in the order of the network."""

    def depths(self) -> dict[nn.Module, int]:
        """How high each module stands, the backbone itself too, in the order of registration.

        0: before the first block, the stem. i + 1: block number i, and what leads from it to the
        next. One more than there are blocks: what follows the last.
        """
        blocks, found, below = self.all_blocks(), {}, 0
        inside = {part: i + 1 for i, block in enumerate(blocks) for part in block.modules()}
        for module in self.modules():
            below = inside.get(module, below)
            done = below == len(blocks) and module not in inside
            found[module] = len(blocks) + 1 if done else below
        return found

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch map of an image of `height` x `width` pixels."""
        return -(-height // self.stride), -(-width // self.stride)

    def misfit(self, size: int) -> str:
        """Why square images of `size` pixels are not taken, before the backbone's name; "" if so.

        "is not a multiple of 16 pixels, the patch size of".
        """
        if size % self.patch_size:
            return f"is not a multiple of {self.patch_size} pixels, the patch size of"
        return ""

    def check_size(self, images: Tensor) -> None:
        """Raise ValueError unless both sides are multiples of `patch_size`."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images of {height}x{width} pixels: both sides must be multiples of the "
                f"patch size {self.patch_size}"
            )


def check_depth(n: int, depth: int) -> None:
    """Raise ValueError unless `n` blocks exist."""
    if not 1 <= n <= depth:
        raise ValueError(f"the last {n} blocks were asked for; the backbone has {depth}")


def init_transformer(module: nn.Module) -> None:
    """The family's initialisation: linears trunc_normal(std 0.02) with zero bias, LayerNorm 1/0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
