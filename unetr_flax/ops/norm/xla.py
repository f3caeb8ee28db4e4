"""The plain definition of normalization by an array's own statistics."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from unetr_flax.ops.dtypes import at_least_float32


def normalize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    per_sample: bool,
    negative_slope: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes LeakyReLU((x - mean) / sqrt(var + epsilon) * scale + bias); see `norm.api`."""
    wide = x.astype(at_least_float32(x.dtype))
    axes = tuple(range(1 if per_sample else 0, x.ndim - 1))
    mean = wide.mean(axes, keepdims=True)
    var = jnp.square(wide - mean).mean(axes, keepdims=True)
    y = (wide - mean) * (lax.rsqrt(var + epsilon) * scale) + bias
    channels = x.shape[-1]
    return leaky_relu(y, negative_slope), mean.reshape(-1, channels), var.reshape(-1, channels)


def leaky_relu(x: jax.Array, negative_slope: float) -> jax.Array:
    """Computes LeakyReLU; ReLU if the slope is 0, x itself if it is 1.

    At 0 its derivative is the slope, as PyTorch's is; that of `nn.leaky_relu` is 1.
    """
    if negative_slope == 1:
        return x
    return jnp.where(x > 0, x, negative_slope * x) if negative_slope else nn.relu(x)
