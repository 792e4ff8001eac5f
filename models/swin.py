"""Swin Transformer (Liu et al. 2021) on timm's blocks, computing what EsViT's Swin computes.

Two functions differ from timm's at sizes that the window does not divide (at 224 they
are the same), and published weights depend on them:
- the map is padded to a multiple of the window BEFORE the cyclic shift (timm: after);
- padded tokens attend and are attended to, unmasked.
Parameters carry EsViT's names: a downsample belongs to the stage before it.
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import PatchEmbed, calculate_drop_path_rates
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.backbone import Backbone, check_depth, init_transformer

LAYER_NORM_EPS = 1e-5
# Map sizes whose shift mask is kept; images of every size would fill the memory.
MOST_MASKS = 64
# Of torch's attentions on a GPU the one that trains a bias, or where it does not take a shape or
# GPU, none that is fused. Left to itself torch would give the teacher, whose bias needs no
# gradient, another one (cuDNN's, or whatever a version prefers).
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's Swin block with the reference's order: pad, shift, attend, shift back, crop.

    A padded token is zero before the block's first linear, so its query, key and value are that
    linear's bias; and what it attends to is cropped. Both linears therefore see the real tokens
    alone, which for the last stage of a 96-pixel crop are 9 of 49.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, dynamic_mask=True, **kwargs)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """A map [B, H, W, C] -> the same shape; bias [heads, M², M²], of `SwinStage.biases`."""
        _, height, width, _ = x.shape
        x = x + self.drop_path1(self._attn(self.norm1(x), bias))
        x = x.flatten(1, 2)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.unflatten(1, (height, width))

    def _attn(self, x: Tensor, bias: Tensor) -> Tensor:
        """Windowed attention over a map [B, H, W, C]."""
        _, height, width, _ = x.shape
        (window_h, window_w), shift, attention = self.window_size, self.shift_size, self.attn
        below, right = -height % window_h, -width % window_w
        if below or right:
            x = F.pad(F.linear(x, attention.qkv.weight), (0, 0, 0, right, 0, below))
            x = x + attention.qkv.bias.to(x.dtype)
        else:
            x = attention.qkv(x)
        rows, columns = (height + below) // window_h, (width + right) // window_w
        if any(shift):
            x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        # A window is a group of heads: so one bias [windows * heads, M², M²] serves all images.
        q, k, v = rearrange(
            x,
            "b (r m) (c n) (t h d) -> t b (r c h) (m n) d",
            m=window_h,
            n=window_w,
            t=3,
            h=self.attn.num_heads,
        ).unbind(0)
        if any(shift):
            mask = shift_mask(rows, columns, self.window_size, shift, x.device)
            bias = bias + mask[:, None]
        bias = bias.expand(rows * columns, -1, -1, -1).flatten(0, 1)
        x = attend(q, k, v, bias.to(x.dtype))
        x = rearrange(
            x,
            "b (r c h) (m n) d -> b (r m) (c n) (h d)",
            r=rows,
            c=columns,
            m=window_h,
            n=window_w,
        )
        if any(shift):
            x = torch.roll(x, shifts=shift, dims=(1, 2))
        return attention.proj(x[:, :height, :width])


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v: q, k, v [B, heads, N, d], bias [heads, N, N]."""
    if q.is_cuda:
        return fused(q, k, v, bias)
    # On a CPU torch has no fused kernel that trains a bias, and its unfused one takes more
    # passes over the attention than this.
    return torch.add(bias, q @ k.mT, alpha=q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`attend` by the same kernel of torch's whether a bias is trained or not."""
    with sdpa_kernel(KERNELS):
        # Not expanded to the batch: torch would make it one when it pads its rows to a multiple
        # of 8, which the kernel wants.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


@torch.compiler.assume_constant_result
def shift_mask(
    rows: int, columns: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    """[rows * columns, M², M²] float32: -100 between tokens of a window that the shift brought
    together from opposite edges of the map, else 0.

    Kept by size, for crops come in two or three sizes for a whole run.
    """
    # Kept beyond this call: a tensor of inference mode could not serve training later.
    with torch.inference_mode(False):
        return _shift_mask(rows, columns, window, shift, device)


@lru_cache(MOST_MASKS)
def _shift_mask(
    rows: int, columns: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    """Tokens of the last row or column of windows are of two regions: moved or not."""

    def moved(windows: int, side: int, step: int) -> Tensor:
        """[windows, side]: whether a line of tokens came from the map's other edge."""
        lines = torch.arange(windows * side)
        return (lines >= windows * side - step).view(windows, side)

    below = moved(rows, window[0], shift[0])
    right = moved(columns, window[1], shift[1])
    region = 2 * below[:, None, :, None] + 1 * right[None, :, None, :]  # [r, c, m, n]
    region = region.flatten(2).flatten(0, 1)
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0).to(device)


class SwinStage(nn.Module):
    """Blocks at one resolution, then the downsample that leads to the next stage."""

    def __init__(
        self,
        dim: int,
        resolution: int,
        heads: int,
        window_size: int,
        drop_path: Sequence[float],
        downsample: bool,
        norm_layer,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PadThenShiftBlock(
                dim=dim,
                input_resolution=(resolution, resolution),
                num_heads=heads,
                window_size=window_size,
                shift_size=0 if index % 2 == 0 else window_size // 2,
                drop_path=rate,
                norm_layer=norm_layer,
            )
            for index, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim, norm_layer=norm_layer) if downsample else None

    def biases(self, calls: int) -> list[list[Tensor]]:
        """For each of `calls` forwards, each block's relative-position bias [heads, M², M²].

        All by one gather, whose gradient is one sum. Each forward has a copy of its own, so that
        a table's gradient is the sum of theirs, the last one's first: the bits of a gather each.
        """
        own = [block.attn for block in self.blocks]
        index, heads = own[0].relative_position_index, own[0].num_heads
        tables = torch.cat([attention.relative_position_bias_table for attention in own] * calls, 1)
        gathered = tables.index_select(0, index.flatten()).T.contiguous()
        parts = gathered.view(calls, len(own), heads, *index.shape).unbind(0)
        biases = [list(part.unbind(0)) for part in reversed(parts)]
        if gathered.requires_grad:
            # A frozen block shall take no gradient by way of the blocks that train.
            for place, attention in enumerate(own):
                if not attention.relative_position_bias_table.requires_grad:
                    for of_call in biases:
                        of_call[place] = of_call[place].detach()
        return biases


class Swin(Backbone):
    """Swin backbone. The image feature is the average of the last stage's normed tokens [esvit].

    img_size: pixels the windows are laid out for. Where a stage's map at this size is no
    larger than the window, the window shrinks to the map and is not shifted; this is fixed
    when the network is built and holds for every crop size (weights depend on it).
    """

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int = 7,
        patch_size: int = 4,
        img_size: int = 224,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(depths)
        norm_layer = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        self.num_features = embed_dim * 2 ** (stages - 1)
        self.patch_size = patch_size
        self.stride = patch_size * 2 ** (stages - 1)
        self.window_size = window_size
        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            embed_dim=embed_dim,
            norm_layer=norm_layer,
            flatten=False,
            output_fmt="NHWC",
            strict_img_size=False,
        )
        rates = calculate_drop_path_rates(drop_path, sum(depths))
        resolution = img_size // patch_size
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(depths):
            first = sum(depths[:stage])
            self.layers.append(
                SwinStage(
                    embed_dim * 2**stage,
                    resolution,
                    num_heads[stage],
                    window_size,
                    rates[first : first + depth],
                    downsample=stage < stages - 1,
                    norm_layer=norm_layer,
                )
            )
            resolution = -(-resolution // 2)
        self.norm = norm_layer(self.num_features)
        self.apply(init_transformer)

    def shared(self, calls: int) -> list[tuple]:
        """The position biases, by stage and block."""
        by_stage = [stage.biases(calls) for stage in self.layers]
        return [(list(biases),) for biases in zip(*by_stage, strict=True)]

    def _block_outputs(self, images: Tensor, biases: Sequence[Sequence[Tensor]] | None = None):
        """Yield (map [B, H, W, C], is the last stage) after every block."""
        self.check_size(images)
        if biases is None:
            ((biases,),) = self.shared(1)
        x = self.patch_embed(images)
        for stage, of_stage in zip(self.layers, biases, strict=True):
            for block, bias in zip(stage.blocks, of_stage, strict=True):
                x = block(x, bias)
                yield x, stage.downsample is None
            if stage.downsample is not None:
                x = stage.downsample(x)

    def all_blocks(self) -> list[nn.Module]:
        return [block for stage in self.layers for block in stage.blocks]

    def forward(self, images: Tensor, biases: Sequence | None = None) -> tuple[Tensor, Tensor]:
        for x, _ in self._block_outputs(images, biases):  # noqa: B007 - the last one is wanted
            pass
        patches = self.norm(x).flatten(1, 2)
        return patches.mean(dim=1), patches

    def last_blocks(
        self, images: Tensor, n: int, avgpool_patchtokens: bool = False
    ) -> tuple[Tensor, ...]:
        check_depth(n, len(self.all_blocks()))
        outputs = list(self._block_outputs(images))[-n:]
        return tuple(
            (self.norm(x) if is_last_stage else x).mean(dim=(1, 2)) for x, is_last_stage in outputs
        )
