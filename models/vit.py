"""Vision Transformer (Dosovitskiy et al. 2020; DeiT, Touvron et al. 2020) on timm's parts.

It differs from timm's in one point: the position embeddings of another crop size are
resized bicubically without antialiasing, as in DINO and EsViT (timm antialiases).
"""

from functools import partial

import torch
from timm.layers import PatchEmbed, calculate_drop_path_rates, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.backbone import Backbone, check_depth, init_transformer

LAYER_NORM_EPS = 1e-6


class ViT(Backbone):
    """ViT backbone. The image feature is the normed [CLS] token, the patch features the rest.

    img_size: pixels the position embeddings are stored for.
    """

    mean_of_patches = False

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        img_size: int = 224,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        norm_layer = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        self.num_features = embed_dim
        self.patch_size = self.stride = patch_size
        self.patch_embed = PatchEmbed(
            img_size, patch_size, embed_dim=embed_dim, strict_img_size=False
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias=True, drop_path=rate, norm_layer=norm_layer)
            for rate in calculate_drop_path_rates(drop_path, depth)
        )
        self.norm = norm_layer(embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_transformer)

    def _position_embeddings(self, rows: int, columns: int) -> Tensor:
        """[1, 1 + rows * columns, D], resized from the stored grid where the size differs."""
        stored = self.patch_embed.grid_size
        if (rows, columns) == stored:  # timm would resize all the same while it exports
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, (rows, columns), stored, antialias=False)

    def _tokens(self, images: Tensor) -> Tensor:
        """The tokens [B, 1 + N, D] that enter the first block."""
        self.check_size(images)
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self._position_embeddings(*self.patch_grid(*images.shape[-2:]))

    def _block_outputs(self, images: Tensor):
        """Yield the tokens [B, 1 + N, D] after every block, before the final norm."""
        x = self._tokens(images)
        for block in self.blocks:
            x = block(x)
            yield x

    def all_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        for x in self._block_outputs(images):  # noqa: B007 - the last one is wanted
            pass
        x = self.norm(x)
        return x[:, 0], x[:, 1:]

    def last_blocks(
        self, images: Tensor, n: int, avgpool_patchtokens: bool = False
    ) -> tuple[Tensor, ...]:
        check_depth(n, len(self.all_blocks()))
        outputs = [self.norm(x) for x in list(self._block_outputs(images))[-n:]]
        features = tuple(x[:, 0] for x in outputs)
        if avgpool_patchtokens:
            features += (outputs[-1][:, 1:].mean(dim=1),)
        return features

    def class_attention(self, images: Tensor) -> Tensor:
        """The last block's attention from [CLS] to the patches, [B, heads, N] float32.

        What a row lacks to 1, [CLS] gives to itself. Computed beside the forward, whose fused
        attention keeps no weights.
        """
        x = self._tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        block = self.blocks[-1]
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        query, key, _ = qkv.unbind(2)  # [B, 1 + N, heads, channels]
        query, key = attention.q_norm(query[:, 0]), attention.k_norm(key)
        scores = attention.scale * torch.einsum("bhc,bnhc->bhn", query.float(), key.float())
        return scores.softmax(dim=-1)[..., 1:]
