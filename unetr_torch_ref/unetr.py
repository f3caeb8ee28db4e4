"""UNETR: a transformer encodes the volume as patches, a U-Net decoder turns it into logits."""

import math
import numbers
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
from unetr_torch_ref.encoder import Embeddings, TransformerBlock, patch_per_axis

# The decoder doubles the resolution four times, so a patch is at most 2**4 voxels along an axis.
NUM_LEVELS = 4
PATCH_SIZES = tuple(2**k for k in range(NUM_LEVELS + 1))
WIDTHS = (32, 64, 128, 256, 512, 1024)


class UNETR(nn.Module):
    """The article's UNETR (Hatamizadeh et al. 2022, figure 2); `light_r` narrows its decoder.

    Args:
      img_shape: voxels per axis.
      input_dim: channels of the image.
      output_dim: channels of the logits.
      embed_dim: width of the tokens, E.
      patch_size: voxels per patch, one number or one per axis, each 1, 2, 4, 8 or 16. An axis with
        a patch smaller than 16 is not up-sampled at the coarsest levels.
      num_heads: attention heads; divides embed_dim.
      dropout: probability of dropping embeddings, attention weights and feed-forward units.
      light_r: divisor of the decoder's widths 32, 64, ..., 1024.
      num_layers: transformer blocks.
      mlp_dim: width of the feed-forward layers; 4 * embed_dim if None.
      ext_layers: the four blocks, counted from 1, whose outputs feed the decoder.

    Raises:
      ValueError: if the model cannot be built; the message names field, value and what is allowed.
    """

    def __init__(
        self,
        img_shape: Sequence[int] = (224, 224, 224),
        input_dim: int = 3,
        output_dim: int = 3,
        embed_dim: int = 768,
        patch_size: int | Sequence[int] = 16,
        num_heads: int = 8,
        dropout: float = 0.1,
        light_r: float = 4,
        *,
        num_layers: int = 12,
        mlp_dim: int | None = None,
        ext_layers: Sequence[int] = (3, 6, 9, 12),
    ):
        super().__init__()
        mlp_dim = 4 * embed_dim if mlp_dim is None else mlp_dim
        check_positive(
            input_dim=input_dim,
            output_dim=output_dim,
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            mlp_dim=mlp_dim,
        )
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.embed_dim = embed_dim
        self.img_shape = tuple(img_shape)
        self.patch_size = patch_per_axis(patch_size)
        self.num_heads = num_heads
        self.dropout = dropout
        self.num_layers = num_layers
        self.ext_layers = checked_layers(ext_layers, num_layers)
        self.conv_channels = _channels(light_r)
        channels = self.conv_channels
        strides = level_strides(self.patch_size)

        self.embedding = Embeddings(
            (input_dim, *self.img_shape), self.patch_size, embed_dim, dropout
        )
        self.patch_dim = self.embedding.patch_dim
        self.transformer = TransformerBlock(
            embed_dim, num_heads, num_layers, dropout, self.ext_layers, mlp_dim=mlp_dim
        )

        self.decoder0 = nn.Sequential(
            Conv3DBlock(input_dim, channels[0], 3),
            Conv3DBlock(channels[0], channels[1], 3),
        )
        self.decoder3 = nn.Sequential(
            Deconv3DBlock(embed_dim, channels[2], stride=strides[0]),
            Deconv3DBlock(channels[2], channels[2], stride=strides[1]),
            Deconv3DBlock(channels[2], channels[2], stride=strides[2]),
        )
        self.decoder6 = nn.Sequential(
            Deconv3DBlock(embed_dim, channels[3], stride=strides[0]),
            Deconv3DBlock(channels[3], channels[3], stride=strides[1]),
        )
        self.decoder9 = Deconv3DBlock(embed_dim, channels[4], stride=strides[0])
        self.decoder12_upsampler = SingleDeconv3DBlock(embed_dim, channels[4], strides[0])
        self.decoder9_upsampler = nn.Sequential(
            Conv3DBlock(channels[5], channels[3]),
            Conv3DBlock(channels[3], channels[3]),
            Conv3DBlock(channels[3], channels[3]),
            SingleDeconv3DBlock(channels[3], channels[3], strides[1]),
        )
        self.decoder6_upsampler = nn.Sequential(
            Conv3DBlock(channels[4], channels[2]),
            Conv3DBlock(channels[2], channels[2]),
            SingleDeconv3DBlock(channels[2], channels[2], strides[2]),
        )
        self.decoder3_upsampler = nn.Sequential(
            Conv3DBlock(channels[3], channels[1]),
            Conv3DBlock(channels[1], channels[1]),
            SingleDeconv3DBlock(channels[1], channels[1], strides[3]),
        )
        self.decoder0_header = nn.Sequential(
            Conv3DBlock(channels[2], channels[1]),
            Conv3DBlock(channels[1], channels[1]),
            SingleConv3DBlock(channels[1], output_dim, 1),
        )

    def encode(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Computes the four features that feed the decoder.

        Args:
          x: image [B, input_dim, *img_shape].
          mask: which tokens each token may attend to, in every block: boolean, broadcastable to
            [B, num_heads, N, N], True = attend.

        Returns:
          One feature [B, N, embed_dim] for each of `ext_layers`: by default [z3, z6, z9, z12].

        Raises:
          ValueError: if the image does not have the model's shape, or the mask is not boolean.
        """
        expected = (self.input_dim, *self.img_shape)
        if x.ndim != 5 or x.shape[1:] != expected:
            raise ValueError(f"x: shape {tuple(x.shape)}, must be (batch, {str(expected)[1:]}")
        return self.transformer(self.embedding(x), mask=mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Segments images [B, input_dim, *img_shape] to logits [B, output_dim, *img_shape].

        Takes the arguments of `encode` and raises its errors.
        """
        h, w, d = self.patch_dim
        z3, z6, z9, z12 = (
            rearrange(z, "b (h w d) e -> b e h w d", h=h, w=w, d=d) for z in self.encode(x, mask)
        )
        z12 = self.decoder12_upsampler(z12)
        z9 = self.decoder9(z9)
        z9 = self.decoder9_upsampler(torch.cat([z9, z12], dim=1))
        z6 = self.decoder6(z6)
        z6 = self.decoder6_upsampler(torch.cat([z6, z9], dim=1))
        z3 = self.decoder3(z3)
        z3 = self.decoder3_upsampler(torch.cat([z3, z6], dim=1))
        z0 = self.decoder0(x)
        return self.decoder0_header(torch.cat([z0, z3], dim=1))


def level_strides(patch_size: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Returns the up-sampling factor of each axis at each level, coarsest first.

    A patch of 2**k voxels needs k doublings, which are those of the k finest levels.
    """
    if any(patch not in PATCH_SIZES for patch in patch_size):
        raise ValueError(f"patch_size={patch_size}: each must be one of {PATCH_SIZES}")
    height, width, depth = (
        [2 if patch >= 2 ** (NUM_LEVELS - level) else 1 for level in range(NUM_LEVELS)]
        for patch in patch_size
    )
    return list(zip(height, width, depth, strict=True))


def _channels(light_r: float) -> list[int]:
    """Divides the decoder's widths; each concatenation must fit the convolution that follows it."""
    if light_r > 0 and math.isfinite(light_r):
        channels = [int(width / light_r) for width in WIDTHS]
        joins_match = all(2 * channels[i] == channels[i + 1] for i in range(1, len(WIDTHS) - 1))
        if channels[0] >= 1 and joins_match:
            return channels
    raise ValueError(
        f"light_r={light_r}: must be above 0, at most {WIDTHS[0]} and leave each of the widths "
        f"{WIDTHS[1:]} divided by it, truncated, twice the one before, as 1, 2, 4, 8, 16, 32 do"
    )


def checked_layers(ext_layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Returns the blocks that feed the decoder; ValueError if not four increasing existing ones."""
    layers = tuple(ext_layers)
    increasing = layers == tuple(sorted(set(layers)))
    if len(layers) != NUM_LEVELS or not increasing or layers[0] < 1 or layers[-1] > num_layers:
        raise ValueError(
            f"ext_layers={layers}: must be {NUM_LEVELS} increasing numbers from 1 to "
            f"num_layers={num_layers}"
        )
    return layers


def check_positive(**values: int) -> None:
    """Raises ValueError for the first of the named values that is not a positive integer."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a positive integer")
