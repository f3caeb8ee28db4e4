"""The convolution blocks of the decoder, for any number of spatial axes.

The simple ones are named as in `unetr_torch_ref`, `UNetBlock` after MONAI's. All arrays are
channels last: [batch, *spatial, channels].
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
from unetr_flax.model.remat import recomputed


def torch_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default initializer of weights and biases: uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def call(block: nn.Module, x: ops.Features, *, remat: bool, **options: Any) -> jax.Array:
    """`block(x, **options)`; with `remat` the backward pass computes its inside again."""

    def apply(block: nn.Module, x: ops.Features) -> jax.Array:
        return block(x, **options)

    return recomputed(apply)(block, x) if remat else apply(block, x)


class SingleConv3DBlock(nn.Module):
    """A convolution that keeps the size: [B, *spatial, C] -> [B, *spatial, features]."""

    features: int
    kernel_size: int = 3
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: ops.Features, *, train: bool = False) -> jax.Array:
        kernel_size = (self.kernel_size,) * ops.rank(x)
        init = torch_uniform(math.prod(kernel_size) * ops.channels(x))
        conv = ops.Conv(
            self.features,
            kernel_size,
            padding="SAME",
            use_bias=self.use_bias,
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        nn.share_scope(self, conv)
        return conv(x, keep=train)


class SingleDeconv3DBlock(nn.Module):
    """A deconvolution of kernel = stride: [B, *spatial, C] -> [B, *up-sampled, features].

    Attributes:
      deferred: whether the convolution that follows computes it, so that the result is no array.
    """

    features: int
    strides: tuple[int, ...]
    use_bias: bool = True
    deferred: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array | ops.DeferredNorm) -> ops.Features:
        # PyTorch takes a deconvolution's fan-in from its output channels.
        init = torch_uniform(math.prod(self.strides) * self.features)
        deconv = ops.ConvTranspose(
            self.features,
            kernel_size=self.strides,
            strides=self.strides,
            padding="VALID",
            use_bias=self.use_bias,
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        nn.share_scope(self, deconv)
        return deconv(x, deferred=self.deferred)


class BatchNorm(nn.Module):
    """Batch normalization whose running statistics follow PyTorch's (Ioffe & Szegedy 2015).

    Unlike `nn.BatchNorm`, the running variance is the unbiased one and the epsilon 1e-5. Under
    `jax.jit` a batch sharded over devices is normalized as the one global batch that it is.

    Attributes:
      negative_slope: of the LeakyReLU that follows: 0 for ReLU, 1 for none.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    affine: bool = True
    negative_slope: float = 1.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, deferred: bool = False
    ) -> jax.Array | ops.DeferredNorm:
        """Normalizes [..., C] over all axes but the last.

        Args:
          x: features.
          train: whether batch statistics are used and updated.
          deferred: in training, whether to leave the result to what follows.

        Raises:
          ValueError: in training, if there is one value per channel and so no variance.
        """
        features = x.shape[-1]
        scale, bias = _affine(self, features)
        running_mean = self.variable(
            "batch_stats", "mean", jnp.zeros, (features,), self.param_dtype
        )
        running_var = self.variable("batch_stats", "var", jnp.ones, (features,), self.param_dtype)

        out_dtype = x.dtype if self.dtype is None else self.dtype
        if not train:
            mean, var = running_mean.value, running_var.value
            y = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
            return _leaky_relu(y, self.negative_slope).astype(out_dtype)
        count = x.size // features
        if count < 2:
            raise ValueError(
                f"x: BatchNorm in training needs more than one value per channel, got {x.shape}"
            )
        options = (self.epsilon, False, self.negative_slope)
        if deferred:
            y = ops.deferred_norm(x, scale, bias, *options, out_dtype)
            moments = y.moments
        else:
            y, *moments = ops.normalize(x, scale, bias, *options)
            y = y.astype(out_dtype)
        if not self.is_initializing():
            mean, var = moments
            for running, batch in (
                (running_mean, mean[0]),
                (running_var, var[0] * count / (count - 1)),
            ):
                batch = batch.astype(self.param_dtype)
                running.value = (1 - self.momentum) * running.value + self.momentum * batch
        return y


class GroupNorm(nn.Module):
    """Normalizes groups of channels of each volume (Wu & He 2018), with PyTorch's epsilon.

    Unlike `nn.GroupNorm` it keeps float32's digits over volumes of a million voxels.

    Attributes:
      num_groups: how many groups; each channel is one if None, which is instance normalization
        (Ulyanov et al. 2016).
      affine: whether to scale and shift each channel.
      negative_slope: of the LeakyReLU that follows; 1 for none.
    """

    num_groups: int | None = None
    epsilon: float = 1e-5
    affine: bool = True
    negative_slope: float = 1.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deferred: bool = False) -> jax.Array | ops.DeferredNorm:
        """[B, *spatial, C] -> [B, *spatial, C].

        Args:
          x: features.
          deferred: whether to leave the result to what follows, where each channel is a group.
        """
        features = x.shape[-1]
        out_dtype = x.dtype if self.dtype is None else self.dtype
        scale, bias = _affine(self, features)
        if self.num_groups is None:
            options = (self.epsilon, True, self.negative_slope)
            if deferred:
                return ops.deferred_norm(x, scale, bias, *options, out_dtype)
            y, _, _ = ops.normalize(x, scale, bias, *options)
            return y.astype(out_dtype)
        # A group's channels become voxels of one channel.
        grouped = x.reshape(*x.shape[:-1], self.num_groups, -1).swapaxes(-1, -2)
        ones = jnp.ones(self.num_groups, scale.dtype)
        y, _, _ = ops.normalize(grouped, ones, jnp.zeros_like(ones), self.epsilon, True)
        y = y.swapaxes(-1, -2).reshape(x.shape) * scale + bias
        return _leaky_relu(y, self.negative_slope).astype(out_dtype)


def _leaky_relu(x: jax.Array, negative_slope: float) -> jax.Array:
    """LeakyReLU; ReLU if the slope is 0, x if it is 1."""
    if negative_slope == 1:
        return x
    return nn.leaky_relu(x, negative_slope) if negative_slope else nn.relu(x)


def _affine(norm: nn.Module, features: int) -> tuple[jax.Array, jax.Array]:
    """Scale and bias of a norm's channels, parameters if it is affine."""
    shape, dtype = (features,), norm.param_dtype
    if not norm.affine:
        return jnp.ones(shape, dtype), jnp.zeros(shape, dtype)
    return (
        norm.param("scale", nn.initializers.ones, shape, dtype),
        norm.param("bias", nn.initializers.zeros, shape, dtype),
    )


class Conv3DBlock(nn.Module):
    """Convolution, batch normalization, ReLU.

    Attributes:
      remat: whether training keeps, of all this, only the convolution's result: what follows
        normalizes it, and in the backward pass once more.
    """

    features: int
    kernel_size: int = 3
    remat: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: ops.Features, *, train: bool = False) -> jax.Array | ops.DeferredNorm:
        """[B, *spatial, C] -> [B, *spatial, features]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = SingleConv3DBlock(self.features, self.kernel_size, **types, name="conv")
        x = call(conv, x, remat=self.remat, train=train)
        norm = BatchNorm(negative_slope=0.0, **types, name="norm")
        return norm(x, train=train, deferred=self.remat)


# Of MONAI's LeakyReLU.
LEAKY_RELU_SLOPE = 0.01


class UNetBlock(nn.Module):
    """Convolution, norm, LeakyReLU, twice (MONAI's UnetBasicBlock and UnetResBlock).

    A residual block adds its input, fitted by a convolution of one voxel and a norm if the widths
    differ, before the last LeakyReLU.

    Attributes:
      remat: whether the backward pass computes the inside again.
    """

    features: int
    style: BlockStyle
    remat: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __call__(self, x: ops.Features, *, train: bool = False) -> jax.Array:
        """[B, *spatial, C] -> [B, *spatial, features]."""
        inside = functools.partial(UNetBlock._inside, train=train)
        return recomputed(inside)(self, x) if self.remat else inside(self, x)

    @nn.compact
    def _inside(self, x: ops.Features, *, train: bool) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(
            SingleConv3DBlock, self.features, use_bias=self.style.use_bias, **types
        )
        norm = functools.partial(_normalize_by_style, style=self.style, train=train, **types)
        y = norm(conv(name="conv1")(x, train=train), negative_slope=LEAKY_RELU_SLOPE, name="norm1")
        y = conv(name="conv2")(y, train=train)
        if self.style.block == "basic":
            return norm(y, negative_slope=LEAKY_RELU_SLOPE, name="norm2")
        y = norm(y, deferred=True, name="norm2")
        if ops.channels(x) == self.features:
            x = ops.joined(x)
        else:
            x = conv(kernel_size=1, name="conv3")(x, train=train)
            x = norm(x, deferred=True, name="norm3")
        return ops.residual((y, x), LEAKY_RELU_SLOPE)


def _normalize_by_style(
    x: jax.Array, *, style: BlockStyle, train: bool, deferred: bool = False, **fields: Any
) -> jax.Array | ops.DeferredNorm:
    """The norm that a style names, as a module of the caller's."""
    if style.norm == "batch":
        norm = BatchNorm(affine=style.norm_affine, **fields)
        return norm(x, train=train, deferred=deferred)
    norm = GroupNorm(style.norm_groups, affine=style.norm_affine, **fields)
    return norm(x, deferred=deferred)


def conv_block(features: int, style: BlockStyle, **fields: Any) -> nn.Module:
    """The convolution block of a style."""
    if style.block == "conv":
        return Conv3DBlock(features, **fields)
    return UNetBlock(features, style, **fields)


class Deconv3DBlock(nn.Module):
    """Deconvolution, then the convolution block of a style."""

    features: int
    strides: tuple[int, ...]
    style: BlockStyle = CONV_BLOCKS
    remat: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array | ops.DeferredNorm, *, train: bool = False
    ) -> jax.Array | ops.DeferredNorm:
        """[B, *spatial, C] -> [B, *(spatial * strides), features]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        deconv = SingleDeconv3DBlock(
            self.features, self.strides, self.style.use_bias, deferred=True, **types, name="deconv"
        )
        block = conv_block(self.features, self.style, remat=self.remat, **types)
        nn.share_scope(self, block)
        return block(deconv(x), train=train)
