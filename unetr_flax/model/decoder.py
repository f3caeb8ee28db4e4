"""The U-Net decoder: up-sample, concatenate a skip, convolve (Hatamizadeh et al. 2022, fig. 2)."""

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
    common_fields,
    conv_block,
)
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.decoder_spec import BlockStyle, DecoderStage


class Stage(nn.Module):
    """One resolution of the decoder, as its `DecoderStage` specifies."""

    spec: DecoderStage
    style: BlockStyle
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes the features of this resolution, [B, *(coarse * strides), fuse_channels[-1]].

        Args:
          x: features of the stage before, [B, *coarse, C].
          skip: source of the skip: token features on the patch grid, or the image.
          train: whether batch statistics are used and updated.
        """
        fields = common_fields(self)
        spec, style = self.spec, self.style
        x = SingleDeconv3DBlock(
            spec.channels, spec.strides, style.use_bias, **fields, name="upsample"
        )(x)
        if spec.skip_strides:
            skip = self._upsample_skip(skip, train)
        else:
            skip = self._convolve(skip, "skip", spec.skip_channels, train)
        x = ops.concatenate([skip, x])
        return self._convolve(x, "fuse", spec.fuse_channels, train)

    def _convolve(self, x: jax.Array, name: str, widths: tuple[int, ...], train: bool) -> jax.Array:
        """Applies one convolution block for each width."""
        fields = {**common_fields(self), "remat": self.remat}
        for i, channels in enumerate(widths):
            x = conv_block(channels, self.style, **fields, name=f"{name}_{i}")(x, train=train)
        return x

    def _upsample_skip(self, skip: jax.Array, train: bool) -> jax.Array:
        """Up-samples features of the patch grid by the skip's own tower of deconvolutions."""
        fields = common_fields(self)
        spec, style = self.spec, self.style
        levels = zip(spec.skip_channels, spec.skip_strides, spec.skip_blocks, strict=True)
        for i, (channels, strides, has_block) in enumerate(levels):
            name = f"skip_{i}"
            if has_block:
                up = Deconv3DBlock(channels, strides, style, self.remat, **fields, name=name)
                skip = up(skip, train=train)
            else:
                up = SingleDeconv3DBlock(channels, strides, style.use_bias, **fields, name=name)
                skip = up(skip)
        return skip


class Decoder(nn.Module):
    """The decoder, which computes logits from the image and the encoder's four features."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"
    remat: bool = False

    @nn.compact
    def __call__(
        self, image: jax.Array, skips: tuple[jax.Array, ...], *, train: bool = False
    ) -> jax.Array:
        """Computes logits [B, *img_size, out_channels].

        Args:
          image: [B, *img_size, C].
          skips: the encoder's four features, [B, N, E] each.
          train: whether batch statistics are used and updated.
        """
        cfg = self.config
        fields = common_fields(self)
        *sources, x = (z.reshape(z.shape[0], *cfg.grid_size, cfg.hidden_size) for z in skips)
        sources = [*reversed(sources), image]
        for i, (spec, source) in enumerate(zip(cfg.decoder_stages, sources, strict=True)):
            stage = Stage(spec, cfg.block_style, **fields, remat=self.remat, name=f"stage_{i}")
            x = stage(x, source, train=train)
        head = SingleConv3DBlock(cfg.out_channels, kernel_size=1, **fields, name="head")
        return call(head, x, remat=self.remat)
