"""The norms of the decoder, for any number of spatial axes, with PyTorch's conventions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unetr_flax import ops
from unetr_flax.ops.dtypes import at_least_float32


class BatchNorm(nn.Module):
    """Batch normalization whose running statistics follow PyTorch's (Ioffe & Szegedy 2015).

    Unlike `nn.BatchNorm`, the running variance is the unbiased one and the epsilon 1e-5, and no
    gradient flows through the running statistics. Under `jax.jit` a batch sharded over devices is
    normalized as the one global batch that it is.

    Attributes:
      momentum: weight of a batch's statistics in the running ones.
      epsilon: number added to the variance.
      affine: whether to scale and shift each channel.
      negative_slope: slope of the LeakyReLU that follows: 0 for ReLU, 1 for none.
      dtype: dtype of the result; the input's if None.
      param_dtype: dtype of parameters and running statistics.
      lowering: "auto" or "xla", see `ops.Lowering`.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    affine: bool = True
    negative_slope: float = 1.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Normalizes [..., C] over all axes but the last.

        Args:
          x: features.
          train: whether batch statistics are used and updated.

        Raises:
          ValueError: in training, if there is one value per channel and so no variance.
        """
        features = x.shape[-1]
        scale, bias = _affine(self, features)
        running_mean = self.variable(
            "batch_stats", "mean", jnp.zeros, (features,), self.param_dtype
        )
        running_var = self.variable("batch_stats", "var", jnp.ones, (features,), self.param_dtype)
        dtype = x.dtype if self.dtype is None else self.dtype
        if not train:
            wide = at_least_float32(x.dtype)
            values = running_mean.value, running_var.value, scale, bias
            mean, var, scale, bias = (value.astype(wide) for value in values)
            y = (x.astype(wide) - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
            return ops.leaky_relu(y, self.negative_slope).astype(dtype)
        count = x.size // features
        if count < 2:
            raise ValueError(
                f"x: BatchNorm in training needs more than one value per channel, got {x.shape}"
            )
        y, mean, var = ops.normalize(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            per_sample=False,
            negative_slope=self.negative_slope,
            dtype=dtype,
            lowering=self.lowering,
        )
        if not self.is_initializing():
            for running, batch in (
                (running_mean, mean[0]),
                (running_var, var[0] * count / (count - 1)),
            ):
                batch = jax.lax.stop_gradient(batch).astype(self.param_dtype)
                running.value = (1 - self.momentum) * running.value + self.momentum * batch
        return y


class GroupNorm(nn.Module):
    """Normalizes groups of channels of each volume (Wu & He 2018), with PyTorch's epsilon.

    Unlike `nn.GroupNorm`, it stays precise in float32 over volumes of a million voxels.

    Attributes:
      num_groups: number of groups; each channel is a group if None, which is instance normalization
        (Ulyanov et al. 2016).
      epsilon: number added to the variance.
      affine: whether to scale and shift each channel.
      negative_slope: slope of the LeakyReLU that follows; 1 for none.
      dtype: dtype of the result; the input's if None.
      param_dtype: dtype of the parameters.
      lowering: "auto" or "xla", see `ops.Lowering`.
    """

    num_groups: int | None = None
    epsilon: float = 1e-5
    affine: bool = True
    negative_slope: float = 1.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes [B, *spatial, C] over the spatial axes of each group."""
        features = x.shape[-1]
        dtype = x.dtype if self.dtype is None else self.dtype
        scale, bias = _affine(self, features)
        options = {"epsilon": self.epsilon, "per_sample": True, "lowering": self.lowering}
        if self.num_groups is None:
            slope = self.negative_slope
            return ops.normalize(x, scale, bias, negative_slope=slope, dtype=dtype, **options)[0]
        # A group's channels become voxels of one channel.
        grouped = x.reshape(*x.shape[:-1], self.num_groups, features // self.num_groups)
        grouped = grouped.swapaxes(-1, -2)
        ones = jnp.ones(self.num_groups, scale.dtype)
        y, _, _ = ops.normalize(grouped, ones, jnp.zeros_like(ones), **options)
        wide = at_least_float32(x.dtype)
        y, scale, bias = (value.astype(wide) for value in (y, scale, bias))
        y = y.swapaxes(-1, -2).reshape(x.shape) * scale + bias
        return ops.leaky_relu(y, self.negative_slope).astype(dtype)


def _affine(norm: BatchNorm | GroupNorm, features: int) -> tuple[jax.Array, jax.Array]:
    """Returns scale and bias of a norm's channels, parameters if the norm is affine."""
    shape, dtype = (features,), norm.param_dtype
    if not norm.affine:
        return jnp.ones(shape, dtype), jnp.zeros(shape, dtype)
    return (
        norm.param("scale", nn.initializers.ones, shape, dtype),
        norm.param("bias", nn.initializers.zeros, shape, dtype),
    )
