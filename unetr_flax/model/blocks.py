"""The convolution blocks of the decoder, for any number of spatial axes.

`UNetBlock` is named after MONAI's blocks, the others as in `unetr_torch_ref`. All arrays are
channels last: [batch, *spatial, channels]. All blocks have the fields
  dtype: dtype of the computation; that of input and parameters if None.
  param_dtype: dtype of parameters and running statistics.
  lowering: "auto" or "xla", see `ops.Lowering`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unetr_flax import ops
from unetr_flax.model.decoder_spec import CONV_BLOCKS, BlockStyle
from unetr_flax.model.norms import BatchNorm, GroupNorm
from unetr_flax.model.remat import recomputed

# Slope of MONAI's LeakyReLU for negative numbers.
LEAKY_RELU_SLOPE = 0.01


def torch_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Makes PyTorch's default initializer of weights and biases: uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        # The numbers of a draw of that shape, whose nested loops XLA takes far longer to compile.
        return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)

    return init


def call(
    block: nn.Module, x: jax.Array, *, remat: bool, train: bool | None = None, **arrays: Any
) -> jax.Array:
    """Calls `block(x, **arrays)`, and tells it `train` unless that is None.

    With `remat` the backward pass computes the block again.
    """
    options = {} if train is None else {"train": train}

    def apply(block: nn.Module, x: jax.Array, arrays: dict[str, Any]) -> jax.Array:
        return block(x, **arrays, **options)

    if remat:
        return recomputed(apply, lowering=block.lowering)(block, x, arrays)
    return apply(block, x, arrays)


def common_fields(module: nn.Module) -> dict[str, Any]:
    """Returns the fields that a module passes on to all of its submodules."""
    return {
        "dtype": module.dtype,
        "param_dtype": module.param_dtype,
        "lowering": module.lowering,
    }


class SingleConv3DBlock(nn.Module):
    """A convolution of stride 1 with SAME padding."""

    features: int
    kernel_size: int = 3
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes [B, *spatial, C] -> [B, *spatial, features]."""
        kernel_size = (self.kernel_size,) * (x.ndim - 2)
        init = torch_uniform(math.prod(kernel_size) * x.shape[-1])
        conv = ops.Conv(
            self.features,
            kernel_size,
            padding="SAME",
            use_bias=self.use_bias,
            kernel_init=init,
            bias_init=init,
            **common_fields(self),
        )
        nn.share_scope(self, conv)
        return conv(x)


class SingleDeconv3DBlock(nn.Module):
    """A deconvolution whose kernel equals its stride."""

    features: int
    strides: tuple[int, ...]
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes [B, *spatial, C] -> [B, *(spatial * strides), features]."""
        # PyTorch computes a deconvolution's fan-in from its output channels.
        init = torch_uniform(math.prod(self.strides) * self.features)
        deconv = ops.ConvTranspose(
            self.features,
            kernel_size=self.strides,
            strides=self.strides,
            padding="VALID",
            use_bias=self.use_bias,
            kernel_init=init,
            bias_init=init,
            **common_fields(self),
        )
        nn.share_scope(self, deconv)
        return deconv(x)


class Conv3DBlock(nn.Module):
    """Convolution, batch normalization, ReLU.

    Attributes:
      remat: whether training stores only the convolution's result; the backward pass computes
        norm and ReLU again.
    """

    features: int
    kernel_size: int = 3
    remat: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes [B, *spatial, C] -> [B, *spatial, features]."""
        fields = common_fields(self)
        conv = SingleConv3DBlock(self.features, self.kernel_size, **fields, name="conv")
        x = call(conv, x, remat=self.remat)
        return BatchNorm(negative_slope=0.0, **fields, name="norm")(x, train=train)


class UNetBlock(nn.Module):
    """Convolution, norm, LeakyReLU, twice (MONAI's UnetBasicBlock and UnetResBlock).

    A residual block adds its input before the last LeakyReLU; if the widths differ, a 1x1x1
    convolution and a norm first project the input.

    Attributes:
      features: width of the result.
      style: kind of block and norm.
      remat: whether the backward pass computes the block again.
    """

    features: int
    style: BlockStyle
    remat: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes [B, *spatial, C] -> [B, *spatial, features]."""
        inside = functools.partial(UNetBlock._inside, train=train)
        return (
            recomputed(inside, lowering=self.lowering)(self, x) if self.remat else inside(self, x)
        )

    @nn.compact
    def _inside(self, x: jax.Array, *, train: bool) -> jax.Array:
        fields = common_fields(self)
        conv = functools.partial(
            SingleConv3DBlock, self.features, use_bias=self.style.use_bias, **fields
        )
        norm = functools.partial(_normalize, style=self.style, train=train, **fields)
        y = norm(conv(name="conv1")(x), negative_slope=LEAKY_RELU_SLOPE, name="norm1")
        y = conv(name="conv2")(y)
        if self.style.block == "basic":
            return norm(y, negative_slope=LEAKY_RELU_SLOPE, name="norm2")
        y = norm(y, name="norm2")
        if x.shape[-1] != self.features:
            x = norm(conv(kernel_size=1, name="conv3")(x), name="norm3")
        return ops.add_leaky_relu(y, x, LEAKY_RELU_SLOPE, lowering=self.lowering)


def _normalize(x: jax.Array, *, style: BlockStyle, train: bool, **fields: Any) -> jax.Array:
    """Calls the norm that a style names, as a submodule of the caller."""
    if style.norm == "batch":
        return BatchNorm(affine=style.norm_affine, **fields)(x, train=train)
    return GroupNorm(style.norm_groups, affine=style.norm_affine, **fields)(x)


def conv_block(features: int, style: BlockStyle, **fields: Any) -> nn.Module:
    """Makes the convolution block of a style."""
    if style.block == "conv":
        return Conv3DBlock(features, **fields)
    return UNetBlock(features, style, **fields)


class Deconv3DBlock(nn.Module):
    """Deconvolution, then the convolution block of a style.

    Attributes:
      remat: whether the backward pass computes the convolution block again.
    """

    features: int
    strides: tuple[int, ...]
    style: BlockStyle = CONV_BLOCKS
    remat: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes [B, *spatial, C] -> [B, *(spatial * strides), features]."""
        fields = common_fields(self)
        deconv = SingleDeconv3DBlock(
            self.features, self.strides, self.style.use_bias, **fields, name="deconv"
        )
        block = conv_block(self.features, self.style, remat=self.remat, **fields)
        nn.share_scope(self, block)
        return block(deconv(x), train=train)
