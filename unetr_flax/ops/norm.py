"""Normalisation by the statistics of an array itself, with few passes over memory."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# XLA:CPU turns sums over more terms than this into windows, which it computes slowly.
TERMS = 32


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, per_sample: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, channel by channel.

    Args:
      x: [N, *spatial, C], float32 or wider.
      scale: [C].
      bias: [C].
      epsilon: added to the variance.
      per_sample: whether mean and variance are those of each sample (Ulyanov et al. 2016, instance
        normalisation), or of all (Ioffe & Szegedy 2015, batch normalisation).

    Returns:
      The result, its mean and its biased variance, both [N, C] if per sample, else [1, C].
    """
    return _normalize(x, scale, bias, epsilon, per_sample)[0]


def _normalize(x, scale, bias, epsilon, per_sample):
    count = x.size // x.shape[-1] // (x.shape[0] if per_sample else 1)
    mean = _channel_sums(x, per_sample) / count
    var = _channel_sums(jnp.square(x - _spread(mean, x)), per_sample) / count
    rstd = lax.rsqrt(var + epsilon)
    y = (x - _spread(mean, x)) * _spread(rstd * scale, x) + bias
    return (y, mean, var), (x, scale, mean, rstd)


def _normalize_bwd(epsilon, per_sample, residuals, cotangents):
    x, scale, mean, rstd = residuals
    grad, mean_grad, var_grad = cotangents
    count = x.size // x.shape[-1] // mean.shape[0]
    grad_sum = _channel_sums(grad, per_sample)
    scaled_sum = _channel_sums(grad * (x - _spread(mean, x)), per_sample) * rstd
    centred = (2 * var_grad - jnp.square(rstd) * scale * scaled_sum) / count
    constant = (mean_grad - rstd * scale * grad_sum) / count
    x_grad = (
        grad * _spread(rstd * scale, x)
        + (x - _spread(mean, x)) * _spread(centred, x)
        + _spread(constant, x)
    )
    return x_grad, scaled_sum.sum(0), grad_sum.sum(0)


normalize.defvjp(_normalize, _normalize_bwd)


def _spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """[N or 1, C] in the shape of x."""
    return values.reshape(-1, *(1,) * (x.ndim - 2), values.shape[-1])


def _channel_sums(x: jax.Array, per_sample: bool) -> jax.Array:
    """Sums over all axes but the last, and the first if per sample: [N or 1, C]."""
    sums = lax.platform_dependent(x, cpu=_sums_in_stages, default=_sums)
    return sums if per_sample else sums.sum(0, keepdims=True)


def _sums(x: jax.Array) -> jax.Array:
    """[N, *spatial, C] -> [N, C]."""
    return x.sum(tuple(range(1, x.ndim - 1)))


def _sums_in_stages(x: jax.Array) -> jax.Array:
    """The same, in stages of few terms.

    XLA:CPU adds terms one after the other: over the voxels of a volume that costs float32 half of
    its digits. The batch stays an axis: devices that share it exchange nothing but the sum.
    """
    n, *spatial, channels = x.shape
    width = (spatial or [1])[-1]
    for size in (width * channels, channels):  # rows first: their sums are as wide as a row
        x = x.reshape(n, -1, size)
        while (terms := x.shape[1]) > 1:
            part = max(k for k in range(1, TERMS + 1) if terms % k == 0)
            part = terms if part == 1 else part
            # The barrier keeps XLA from making one long sum of two stages again.
            x = lax.optimization_barrier(x.reshape(n, terms // part, part, size).sum(2))
    return x.reshape(n, channels)
