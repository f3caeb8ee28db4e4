"""The transformer encoder (Hatamizadeh et al. 2022, section 3.1, equations 1 to 4).

Shapes: B batch, N tokens, E embedding size, h heads, d head size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def patch_per_axis(patch_size: int | Sequence[int]) -> tuple[int, int, int]:
    """Returns a patch size for each of the three axes; ValueError if not positive or not three."""
    patches = tuple(patch_size) if isinstance(patch_size, Sequence) else (patch_size,) * 3
    if len(patches) != 3 or min(patches) < 1:
        raise ValueError(f"patch_size={patch_size}: must be one positive number or one per axis")
    height, width, depth = patches
    return height, width, depth


class Embeddings(nn.Module):
    """Maps each patch of an image linearly to a token and adds a learned position (equation 1).

    [B, C, H, W, D] -> [B, N, E], patches in row-major order. There is no class token.

    Args:
      input_shape: (C, H, W, D) of the image.
      patch_size: voxels per patch, one number or one per axis.
      embed_dim: width of the tokens, E.
      dropout: probability of dropping an element of a token.

    Raises:
      ValueError: if there are not three axes, or an axis is not a whole number of patches.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 768,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.in_channels, *img_shape = input_shape
        self.patch_size = patch_per_axis(patch_size)
        if (
            len(img_shape) != 3
            or min(img_shape) < 1
            or any(size % patch for size, patch in zip(img_shape, self.patch_size, strict=True))
        ):
            raise ValueError(
                f"img_shape={tuple(img_shape)}: must be three sizes, each a positive multiple of "
                f"its patch_size={self.patch_size}"
            )
        self.patch_dim = [s // p for s, p in zip(img_shape, self.patch_size, strict=True)]
        self.n_patches = math.prod(self.patch_dim)
        self.embed_dim = embed_dim
        self.patch_embeddings = nn.Conv3d(
            self.in_channels, embed_dim, kernel_size=self.patch_size, stride=self.patch_size
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.n_patches, embed_dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embeddings(x)  # [B, E, H/patch, W/patch, D/patch]
        x = rearrange(x, "b e h w d -> b (h w d) e")
        return self.dropout(x + self.position_embeddings)


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention (equation 3), scaled by sqrt(E) and not by sqrt(d).

    One linear map makes queries, keys and values; its output features are ordered (h d qkv).

    Args:
      emb_size: width of the tokens, E.
      num_heads: number of heads, h; must divide E.
      dropout: probability of dropping an attention weight.

    Raises:
      ValueError: if the heads do not divide the embedding.
    """

    def __init__(self, emb_size: int = 768, num_heads: int = 8, dropout: float = 0.0):
        super().__init__()
        if num_heads < 1 or emb_size % num_heads:
            raise ValueError(f"num_heads={num_heads}: must divide the embedding size {emb_size}")
        self.emb_size = emb_size
        self.num_heads = num_heads
        self.qkv = nn.Linear(emb_size, emb_size * 3)
        self.att_drop = nn.Dropout(dropout)
        self.projection = nn.Linear(emb_size, emb_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mixes the tokens, [B, N, E] -> [B, N, E].

        Args:
          x: tokens.
          mask: boolean, broadcastable to [B, h, N queries, N keys]; True where a query may attend
            to a key. A query without any such key attends to all keys equally.

        Raises:
          ValueError: if the mask is not boolean.
        """
        qkv = rearrange(
            self.qkv(x), "b n (h d qkv) -> (qkv) b h n d", h=self.num_heads, qkv=3
        )  # [3, B, h, N, d]
        queries, keys, values = qkv[0], qkv[1], qkv[2]
        energy = torch.einsum("bhqd, bhkd -> bhqk", queries, keys)
        if mask is not None:
            if mask.dtype != torch.bool:
                raise ValueError(f"mask: dtype {mask.dtype}, must be torch.bool (True = attend)")
            energy = energy.masked_fill(~mask, torch.finfo(energy.dtype).min)
        scaling = self.emb_size ** (1 / 2)
        att = F.softmax(energy / scaling, dim=-1)
        att = self.att_drop(att)
        out = torch.einsum("bhqk, bhkd -> bhqd", att, values)
        out = rearrange(out, "b h n d -> b n (h d)")
        return self.projection(out)


class FeedForwardBlock(nn.Sequential):
    """Linear, exact GELU, dropout, linear: [B, N, E] -> [B, N, E].

    Args:
      emb_size: width of the tokens, E.
      expansion: width of the hidden layer in units of E.
      drop_p: probability of dropping a hidden unit.
      hidden: width of the hidden layer; expansion * E if None.
    """

    def __init__(
        self,
        emb_size: int = 768,
        expansion: int = 4,
        drop_p: float = 0.0,
        *,
        hidden: int | None = None,
    ):
        hidden = expansion * emb_size if hidden is None else hidden
        super().__init__(
            nn.Linear(emb_size, hidden),
            nn.GELU(),
            nn.Dropout(drop_p),
            nn.Linear(hidden, emb_size),
        )


class PreNorm(nn.Module):
    """Layer norm, then a module; keyword arguments, such as the mask, go to the module."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return self.fn(self.norm(x), **kwargs)


class TransformerBlock(nn.Module):
    """The whole stack of pre-norm blocks (equations 2 and 3), with no norm after the last.

    Args:
      embed_dim: width of the tokens, E.
      num_heads: attention heads.
      depth: number of blocks.
      dropout: probability of dropping attention weights and hidden units.
      extract_layers: blocks, counted from 1, whose outputs are returned.
      mlp_dim: width of the feed-forward layers; 4 * E if None.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        num_heads: int = 8,
        depth: int = 12,
        dropout: float = 0.0,
        extract_layers: Sequence[int] = (3, 6, 9, 12),
        *,
        mlp_dim: int | None = None,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(embed_dim, MultiHeadAttention(embed_dim, num_heads, dropout)),
                    PreNorm(embed_dim, FeedForwardBlock(embed_dim, 4, dropout, hidden=mlp_dim)),
                ]
            )
            for _ in range(depth)
        )
        self.extract_layers = tuple(extract_layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Computes one [B, N, E] for each of `extract_layers`; all blocks use the mask."""
        extracted = []
        for number, layer in enumerate(self.layers, start=1):
            attn, ff = layer.children()
            x = attn(x, mask=mask) + x
            x = ff(x) + x
            if number in self.extract_layers:
                extracted.append(x)
        return extracted
