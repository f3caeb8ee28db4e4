"""The convolution blocks of the decoder, for any number of spatial axes.

Named as in `unetr_torch_ref`. All arrays are channels last: [batch, *spatial, channels].
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unetr_flax import ops


def torch_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default initialiser of weights and biases: uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The precision for sums over many numbers of a dtype: narrower ones would lose digits."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


class SingleConv3DBlock(nn.Module):
    """A convolution that keeps the size: [B, *spatial, C] -> [B, *spatial, features]."""

    features: int
    kernel_size: int = 3
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_size = (self.kernel_size,) * (x.ndim - 2)
        init = torch_uniform(math.prod(kernel_size) * x.shape[-1])
        conv = nn.Conv(
            self.features,
            kernel_size,
            padding="SAME",
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            conv_general_dilated=ops.conv_general_dilated,
        )
        nn.share_scope(self, conv)
        return conv(x)


class SingleDeconv3DBlock(nn.Module):
    """A deconvolution of kernel = stride: [B, *spatial, C] -> [B, *up-sampled, features]."""

    features: int
    strides: tuple[int, ...]
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # PyTorch takes a deconvolution's fan-in from its output channels.
        init = torch_uniform(math.prod(self.strides) * self.features)
        deconv = ops.ConvTranspose(
            self.features,
            kernel_size=self.strides,
            strides=self.strides,
            padding="VALID",
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        nn.share_scope(self, deconv)
        return deconv(x)


class BatchNorm(nn.Module):
    """Batch normalisation whose running statistics follow PyTorch's (Ioffe & Szegedy 2015).

    Unlike `nn.BatchNorm`, the running variance is the unbiased one and the epsilon 1e-5. Under
    `jax.jit` a batch sharded over devices is normalised as the one global batch that it is.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Normalises [..., C] over all axes but the last.

        Raises:
          ValueError: in training, if there is one value per channel and so no variance.
        """
        features = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (features,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (features,), self.param_dtype)
        running_mean = self.variable(
            "batch_stats", "mean", jnp.zeros, (features,), self.param_dtype
        )
        running_var = self.variable("batch_stats", "var", jnp.ones, (features,), self.param_dtype)

        out_dtype = x.dtype if self.dtype is None else self.dtype
        x = x.astype(at_least_float32(x.dtype))
        if train:
            count = x.size // features
            if count < 2:
                raise ValueError(
                    f"x: BatchNorm in training needs more than one value per channel, got {x.shape}"
                )
            y, mean, var = ops.normalize(x, scale, bias, self.epsilon, False)
            if not self.is_initializing():
                for running, batch in (
                    (running_mean, mean[0]),
                    (running_var, var[0] * count / (count - 1)),
                ):
                    batch = batch.astype(self.param_dtype)
                    running.value = (1 - self.momentum) * running.value + self.momentum * batch
        else:
            mean, var = running_mean.value, running_var.value
            y = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(out_dtype)


class Conv3DBlock(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    features: int
    kernel_size: int = 3
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, *spatial, C] -> [B, *spatial, features]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = SingleConv3DBlock(self.features, self.kernel_size, **types, name="conv")(x)
        return nn.relu(BatchNorm(**types, name="norm")(x, train=train))


class Deconv3DBlock(nn.Module):
    """Deconvolution, then what a `Conv3DBlock` does."""

    features: int
    strides: tuple[int, ...]
    kernel_size: int = 3
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, *spatial, C] -> [B, *(spatial * strides), features]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = SingleDeconv3DBlock(self.features, self.strides, **types, name="deconv")(x)
        x = SingleConv3DBlock(self.features, self.kernel_size, **types, name="conv")(x)
        return nn.relu(BatchNorm(**types, name="norm")(x, train=train))
