"""The U-Net decoder (Hatamizadeh et al. 2022, figure 2): up-sample, join with a skip, convolve."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unetr_flax import ops
from unetr_flax.model.blocks import (
    Deconv3DBlock,
    SingleConv3DBlock,
    SingleDeconv3DBlock,
    call,
    conv_block,
)
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.decoder_spec import BlockStyle, DecoderStage


class Stage(nn.Module):
    """One resolution of the decoder, as its `DecoderStage` plans it."""

    plan: DecoderStage
    style: BlockStyle
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array | ops.DeferredNorm, skip: jax.Array, *, train: bool = False
    ) -> jax.Array | ops.DeferredNorm:
        """[B, *coarse, C] and the skip's source -> [B, *(coarse * strides), fuse_channels[-1]].

        Args:
          x: features of the stage before.
          skip: what the skip is computed from: token features on the patch grid, or the image.
          train: whether batch statistics are used and updated.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {**types, "remat": self.remat}
        plan, style = self.plan, self.style
        x = SingleDeconv3DBlock(
            plan.channels, plan.strides, style.use_bias, deferred=True, **types, name="upsample"
        )(x)
        if plan.skip_strides:
            skip = self._upsampled(skip, train)
        else:
            for i, channels in enumerate(plan.skip_channels):
                skip = conv_block(channels, style, **options, name=f"skip_{i}")(skip, train=train)
        x = (skip, x)
        for i, channels in enumerate(plan.fuse_channels):
            x = conv_block(channels, style, **options, name=f"fuse_{i}")(x, train=train)
        return x

    def _upsampled(self, skip: jax.Array, train: bool) -> jax.Array | ops.DeferredNorm:
        """Features of the patch grid, through the skip's tower of deconvolutions."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {**types, "remat": self.remat}
        plan, style = self.plan, self.style
        levels = zip(plan.skip_channels, plan.skip_strides, plan.skip_blocks, strict=True)
        for i, (channels, strides, block) in enumerate(levels):
            name = f"skip_{i}"
            if block:
                up = Deconv3DBlock(channels, strides, style, **options, name=name)
                skip = up(skip, train=train)
            else:
                up = SingleDeconv3DBlock(channels, strides, style.use_bias, **types, name=name)
                skip = up(skip)
        return skip


class Decoder(nn.Module):
    """Image and the encoder's four features to logits."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

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
            stage = Stage(plan, cfg.block_style, **types, remat=self.remat, name=f"stage_{i}")
            x = stage(x, source, train=train)
        head = SingleConv3DBlock(cfg.out_channels, kernel_size=1, **types, name="head")
        return call(head, x, remat=self.remat, train=train)
