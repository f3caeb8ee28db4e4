"""The UNETR of github.com/tamasino52/UNETR, a wider sibling of the article's.

It differs from the article's in four ways: queries, keys and values come from three linear maps,
attention is scaled by the head size, feed-forward layers use ReLU, and the channels of the skips
decrease from stage to stage.
Shapes: B batch, N tokens, E embedding size, h heads, d head size.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from unetr_torch_ref.blocks import (
    Conv3DBlock,
    Deconv3DBlock,
    SingleConv3DBlock,
    SingleDeconv3DBlock,
)
from unetr_torch_ref.encoder import Embeddings, patch_per_axis
from unetr_torch_ref.unetr import check_positive, checked_layers, level_strides

NORM_EPSILON = 1e-6
# Feed-forward layers drop with this probability, whatever the model's `dropout` is.
FEED_FORWARD_DROPOUT = 0.1


class SelfAttention(nn.Module):
    """Multi-head self-attention, scaled by sqrt(d): [B, N, E] -> [B, N, E].

    Raises:
      ValueError: if the heads do not divide the embedding.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: must divide embed_dim={embed_dim}")
        self.num_heads = num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.attn_dropout = nn.Dropout(dropout)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.proj_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            rearrange(linear(x), "b n (h d) -> b h n d", h=self.num_heads)
            for linear in (self.query, self.key, self.value)
        )
        energy = torch.einsum("bhqd, bhkd -> bhqk", query, key) / query.shape[-1] ** 0.5
        weights = self.attn_dropout(energy.softmax(dim=-1))
        mixed = torch.einsum("bhqk, bhkd -> bhqd", weights, value)
        return self.proj_dropout(self.out(rearrange(mixed, "b h n d -> b n (h d)")))


class FeedForward(nn.Module):
    """Linear, ReLU, dropout, linear: [B, N, E] -> [B, N, E]."""

    def __init__(self, embed_dim: int, mlp_dim: int):
        super().__init__()
        self.w_1 = nn.Linear(embed_dim, mlp_dim)
        self.w_2 = nn.Linear(mlp_dim, embed_dim)
        self.dropout = nn.Dropout(FEED_FORWARD_DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(torch.relu(self.w_1(x))))


class EncoderLayer(nn.Module):
    """A pre-norm block: [B, N, E] -> [B, N, E]."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim, eps=NORM_EPSILON)
        self.attn = SelfAttention(embed_dim, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(embed_dim, eps=NORM_EPSILON)
        self.mlp = FeedForward(embed_dim, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Patch embedding and blocks; `encoder_norm` is in every checkpoint but is never applied."""

    def __init__(
        self,
        embeddings: Embeddings,
        num_heads: int,
        num_layers: int,
        mlp_dim: int,
        dropout: float,
        extract_layers: tuple[int, ...],
    ):
        super().__init__()
        width = embeddings.embed_dim
        self.embeddings = embeddings
        self.layer = nn.ModuleList(
            EncoderLayer(width, num_heads, mlp_dim, dropout) for _ in range(num_layers)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.extract_layers = extract_layers

    def forward(self, x: Tensor) -> list[Tensor]:
        """Computes one [B, N, E] for each of `extract_layers` from the image [B, C, H, W, D]."""
        x = self.embeddings(x)
        extracted = []
        for number, layer in enumerate(self.layer, start=1):
            x = layer(x)
            if number in self.extract_layers:
                extracted.append(x)
        return extracted


class Tamasino52UNETR(nn.Module):
    """The whole model; its attributes are named as the keys of its checkpoints are.

    Args:
      img_shape: voxels per axis.
      input_dim: channels of the image.
      output_dim: channels of the logits.
      embed_dim: width of the tokens, E.
      patch_size: voxels per patch, as in `UNETR`; all checkpoints have 16.
      num_heads: attention heads; divides embed_dim.
      dropout: probability of dropping embeddings, attention weights and attention's output;
        feed-forward layers always drop 0.1.
      mlp_dim: width of the feed-forward layers.
      channels: width of the decoder at full resolution, even.
      num_layers: transformer blocks.
      ext_layers: the four blocks, counted from 1, whose outputs feed the decoder.

    Raises:
      ValueError: if the model cannot be built; the message names field, value and what is allowed.
    """

    def __init__(
        self,
        img_shape: Sequence[int] = (128, 128, 128),
        input_dim: int = 4,
        output_dim: int = 3,
        embed_dim: int = 768,
        patch_size: int | Sequence[int] = 16,
        num_heads: int = 12,
        dropout: float = 0.1,
        *,
        mlp_dim: int = 2048,
        channels: int = 64,
        num_layers: int = 12,
        ext_layers: Sequence[int] = (3, 6, 9, 12),
    ):
        super().__init__()
        check_positive(
            input_dim=input_dim,
            output_dim=output_dim,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            num_layers=num_layers,
        )
        if channels < 2 or channels % 2:
            raise ValueError(f"channels={channels}: must be positive and even")
        self.input_dim = input_dim
        self.img_shape = tuple(img_shape)
        patches = patch_per_axis(patch_size)
        strides = level_strides(patches)
        embeddings = Embeddings((input_dim, *self.img_shape), patches, embed_dim, dropout)
        self.patch_dim = embeddings.patch_dim
        self.transformer = Transformer(
            embeddings,
            num_heads,
            num_layers,
            mlp_dim,
            dropout,
            checked_layers(ext_layers, num_layers),
        )
        # Widths of the decoder from full resolution to the coarsest.
        c0, c1, c2, c3 = (channels * 2**level for level in range(4))
        self.decoder0 = nn.Sequential(Conv3DBlock(input_dim, c0 // 2), Conv3DBlock(c0 // 2, c0))
        self.decoder3 = nn.Sequential(
            Deconv3DBlock(embed_dim, c3, stride=strides[0]),
            Deconv3DBlock(c3, c2, stride=strides[1]),
            Deconv3DBlock(c2, c1, stride=strides[2]),
        )
        self.decoder6 = nn.Sequential(
            Deconv3DBlock(embed_dim, c3, stride=strides[0]),
            Deconv3DBlock(c3, c2, stride=strides[1]),
        )
        self.decoder9 = Deconv3DBlock(embed_dim, c3, stride=strides[0])
        self.decoder12_upsampler = SingleDeconv3DBlock(embed_dim, c3, strides[0])
        self.decoder9_upsampler = nn.Sequential(
            Conv3DBlock(2 * c3, c3),
            Conv3DBlock(c3, c3),
            Conv3DBlock(c3, c3),
            SingleDeconv3DBlock(c3, c2, strides[1]),
        )
        self.decoder6_upsampler = nn.Sequential(
            Conv3DBlock(2 * c2, c2), Conv3DBlock(c2, c2), SingleDeconv3DBlock(c2, c1, strides[2])
        )
        self.decoder3_upsampler = nn.Sequential(
            Conv3DBlock(2 * c1, c1), Conv3DBlock(c1, c1), SingleDeconv3DBlock(c1, c0, strides[3])
        )
        self.decoder0_header = nn.Sequential(
            Conv3DBlock(2 * c0, c0), Conv3DBlock(c0, c0), SingleConv3DBlock(c0, output_dim, 1)
        )

    def encode(self, x: Tensor) -> list[Tensor]:
        """Encodes images [B, input_dim, *img_shape] as the four features that feed the decoder.

        Returns:
          One feature [B, N, embed_dim] for each of `ext_layers`: by default [z3, z6, z9, z12].

        Raises:
          ValueError: if the image does not have the model's shape.
        """
        expected = (self.input_dim, *self.img_shape)
        if x.ndim != 5 or x.shape[1:] != expected:
            raise ValueError(f"x: shape {tuple(x.shape)}, must be (batch, {str(expected)[1:]}")
        return self.transformer(x)

    def forward(self, x: Tensor) -> Tensor:
        """Segments images [B, input_dim, *img_shape] to logits [B, output_dim, *img_shape].

        Raises the errors of `encode`.
        """
        h, w, d = self.patch_dim
        z3, z6, z9, z12 = (
            rearrange(z, "b (h w d) e -> b e h w d", h=h, w=w, d=d) for z in self.encode(x)
        )
        y = self.decoder12_upsampler(z12)
        y = self.decoder9_upsampler(torch.cat([self.decoder9(z9), y], dim=1))
        y = self.decoder6_upsampler(torch.cat([self.decoder6(z6), y], dim=1))
        y = self.decoder3_upsampler(torch.cat([self.decoder3(z3), y], dim=1))
        return self.decoder0_header(torch.cat([self.decoder0(x), y], dim=1))
