"""Normalization by an array's own statistics: batch and instance normalization."""

import jax
from jax.typing import DTypeLike

from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.features import DeferredNorm, remember
from unetr_flax.ops.norm import xla
from unetr_flax.ops.platform import Lowering
from unetr_flax.ops.reductions import moments


def normalize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    per_sample: bool,
    negative_slope: float = 1.0,
    dtype: DTypeLike | None = None,
    lowering: Lowering = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes LeakyReLU((x - mean) / sqrt(var + epsilon) * scale + bias), channel by channel.

    Args:
      x: [N, *spatial, C].
      scale: [C].
      bias: [C].
      epsilon: number added to the variance.
      per_sample: whether mean and variance are those of each sample (Ulyanov et al. 2016, instance
        normalization), or of all (Ioffe & Szegedy 2015, batch normalization).
      negative_slope: factor on negative results: 0 for ReLU, 1 for none.
      dtype: dtype of the result; x's if None.
      lowering: "auto" or "xla", see `platform.Lowering`.

    Returns:
      The result [N, *spatial, C]; its mean and its biased variance, [N, C] each if per sample, else
      [1, C]. These two, and the computation, are in float32 or wider.
    """
    dtype = dtype or x.dtype
    wide = at_least_float32(x.dtype)
    scale, bias = scale.astype(wide), bias.astype(wide)
    if lowering == "xla":
        y, mean, var = xla.normalize(x, scale, bias, epsilon, per_sample, negative_slope)
        return y.astype(dtype), mean, var
    mean, var = moments(x, per_sample)
    norm = DeferredNorm(x, (mean, var), scale, bias, epsilon, per_sample, negative_slope, dtype)
    return remember(norm.array(), norm), mean, var
