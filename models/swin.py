"""Swin Transformer (Liu et al. 2021) on timm's blocks, computing what EsViT's Swin computes.

Two functions differ from timm's at sizes that the window does not divide (at 224 they
are the same), and published weights depend on them:
- the map is padded to a multiple of the window BEFORE the cyclic shift (timm: after);
- padded tokens attend and are attended to, unmasked.
Parameters carry EsViT's names: a downsample belongs to the stage before it.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from models.backbone import Backbone, check_depth, drop_path_rates, init_transformer

LAYER_NORM_EPS = 1e-5
# Map sizes whose shift mask a block keeps; images of every size would fill the memory.
MOST_MASKS = 16


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's Swin block with the reference's order: pad, shift, attend, shift back, crop."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, dynamic_mask=True, **kwargs)
        # One mask per map size: crops come in two or three sizes for a whole run.
        self._masks: dict[tuple, Tensor] = {}

    def _shift_mask(self, x: Tensor) -> Tensor | None:
        """Mask [windows, M², M²] that keeps wrapped-around regions apart; None without shift."""
        key = (x.shape[1], x.shape[2], x.device, x.dtype)
        if key not in self._masks:
            if len(self._masks) == MOST_MASKS:
                self._masks.clear()
            # Kept beyond this call: a tensor of inference mode could not serve training later.
            with torch.inference_mode(False):
                self._masks[key] = self.get_attn_mask(x)
        return self._masks[key]

    def _attn(self, x: Tensor) -> Tensor:
        """Windowed attention over a map [B, H, W, C]."""
        _, height, width, _ = x.shape
        (window_h, window_w), shift = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -width % window_w, 0, -height % window_h))
        rows, columns = x.shape[1] // window_h, x.shape[2] // window_w
        if any(shift):
            x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        windows = rearrange(x, "b (r m) (c n) d -> (b r c) (m n) d", m=window_h, n=window_w)
        windows = self.attn(windows, mask=self._shift_mask(x) if any(shift) else None)
        x = rearrange(
            windows, "(b r c) (m n) d -> b (r m) (c n) d", r=rows, c=columns, m=window_h, n=window_w
        )
        if any(shift):
            x = torch.roll(x, shifts=shift, dims=(1, 2))
        return x[:, :height, :width].contiguous()


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
        rates = drop_path_rates(drop_path, sum(depths))
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

    def _block_outputs(self, images: Tensor):
        """Yield (map [B, H, W, C], is the last stage) after every block."""
        self.check_size(images)
        x = self.patch_embed(images)
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
                yield x, stage.downsample is None
            if stage.downsample is not None:
                x = stage.downsample(x)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        for x, _ in self._block_outputs(images):  # noqa: B007 - the last one is wanted
            pass
        patches = self.norm(x).flatten(1, 2)
        return patches.mean(dim=1), patches

    def last_blocks(
        self, images: Tensor, n: int, avgpool_patchtokens: bool = False
    ) -> tuple[Tensor, ...]:
        check_depth(n, sum(len(stage.blocks) for stage in self.layers))
        outputs = list(self._block_outputs(images))[-n:]
        return tuple(
            (self.norm(x) if is_last_stage else x).mean(dim=(1, 2)) for x, is_last_stage in outputs
        )
