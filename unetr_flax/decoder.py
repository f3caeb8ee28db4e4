"""The U-Net decoder (Hatamizadeh et al. 2022, figure 2): up-sample, join with a skip, convolve."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unetr_flax.blocks import Conv3DBlock, Deconv3DBlock, SingleConv3DBlock, SingleDeconv3DBlock
from unetr_flax.config import DecoderStage, UNETRConfig


class Stage(nn.Module):
    """One resolution of the decoder, as its `DecoderStage` plans it."""

    plan: DecoderStage
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, *coarse, C] and the skip's source -> [B, *(coarse * strides), fuse_channels[-1]].

        Args:
          x: features of the stage before.
          skip: what the skip is computed from: token features on the patch grid, or the image.
          train: whether batch statistics are used and updated.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plan = self.plan
        x = SingleDeconv3DBlock(plan.channels, plan.strides, **types, name="upsample")(x)
        for i, channels in enumerate(plan.skip_channels):
            if plan.skip_strides:
                block = Deconv3DBlock(channels, plan.skip_strides[i], **types, name=f"skip_{i}")
            else:
                block = Conv3DBlock(channels, **types, name=f"skip_{i}")
            skip = block(skip, train=train)
        x = jnp.concatenate([skip, x], axis=-1)
        for i, channels in enumerate(plan.fuse_channels):
            x = Conv3DBlock(channels, **types, name=f"fuse_{i}")(x, train=train)
        return x


class Decoder(nn.Module):
    """Image and the encoder's four features to logits."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, image: jax.Array, skips: tuple[jax.Array, ...], *, train: bool = False
    ) -> jax.Array:
        """[B, *img_size, C] and four [B, N, E] -> logits [B, *img_size, out_channels]."""
        cfg = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        *sources, x = (z.reshape(z.shape[0], *cfg.grid_size, cfg.hidden_size) for z in skips)
        sources = [*reversed(sources), image]
        for i, (plan, source) in enumerate(zip(cfg.decoder_stages, sources, strict=True)):
            x = Stage(plan, **types, name=f"stage_{i}")(x, source, train=train)
        return SingleConv3DBlock(cfg.out_channels, kernel_size=1, **types, name="head")(x)
