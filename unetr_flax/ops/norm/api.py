"""Normalization by the statistics of an array itself, with few passes over memory."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops import reductions as sums
from unetr_flax.ops.materialize import materialize
from unetr_flax.ops.norm import tpu_in_place as in_place_tpu
from unetr_flax.ops.platform import by_platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    per_sample: bool,
    negative_slope: float = 1.0,
    moments: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """LeakyReLU((x - mean) / sqrt(var + epsilon) * scale + bias), channel by channel.

    Args:
      x: [N, *spatial, C].
      scale: [C].
      bias: [C].
      epsilon: added to the variance.
      per_sample: whether mean and variance are those of each sample (Ulyanov et al. 2016, instance
        normalization), or of all (Ioffe & Szegedy 2015, batch normalization).
      negative_slope: what negative results are multiplied by: 0 for ReLU, 1 for none.
      moments: mean and variance of x as below, if they are known already; the gradient is the same.

    Returns:
      The result, in x's dtype; its mean and its biased variance, both [N, C] if per sample, else
      [1, C], in float32 or wider, as is what is computed on the way.
    """
    return _normalize(x, scale, bias, epsilon, per_sample, negative_slope, moments)[0]


def _normalize(x, scale, bias, epsilon, per_sample, negative_slope, moments):
    mean, var = moments or sums.moments(x, per_sample)
    rstd = lax.rsqrt(var + epsilon)

    def apply(x, mean, factor, bias):
        return affine(x, mean, factor, bias, negative_slope).astype(x.dtype)

    y = materialize(apply, mean, x, mean, rstd * scale, bias)
    return (y, mean, var), (x, scale, bias, mean, rstd)


def _normalize_bwd(epsilon, per_sample, negative_slope, residuals, cotangents):
    x, scale, bias, mean, rstd = residuals
    grad, mean_grad, var_grad = cotangents
    count = x.size // x.shape[-1] // mean.shape[0]

    def before(x, grad, mean, factor, bias):
        """The gradient before LeakyReLU."""
        grad = grad.astype(mean.dtype)
        return _where_negative(_affine(x, mean, factor, bias), grad, negative_slope)

    def terms(x, grad, mean, factor, bias):
        grad = before(x, grad, mean, factor, bias)
        return grad, grad * (x.astype(mean.dtype) - _spread(mean, x))

    values = mean, rstd * scale, bias
    grad_sum, scaled_sum = sums.sum_terms(terms, (x, grad), values, per_sample)
    scaled_sum *= rstd
    centerd = (2 * var_grad - jnp.square(rstd) * scale * scaled_sum) / count
    constant = (mean_grad - rstd * scale * grad_sum) / count

    def combine(x, grad, mean, factor, bias, centerd, constant):
        grad = before(x, grad, mean, factor, bias) * _spread(factor, x)
        centerd_x = x.astype(mean.dtype) - _spread(mean, x)
        grad += centerd_x * _spread(centerd, x) + _spread(constant, x)
        return grad.astype(x.dtype)

    operands = (x, grad, mean, rstd * scale, bias, centerd, constant)
    x_grad = by_platform(
        *operands,
        tpu=functools.partial(in_place_tpu.elementwise, combine),
        default=functools.partial(materialize, combine, mean),
    )
    return x_grad, scaled_sum.sum(0), grad_sum.sum(0), None


normalize.defvjp(_normalize, _normalize_bwd)


def affine(
    x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array, negative_slope: float
) -> jax.Array:
    """LeakyReLU((x - mean) * factor + bias) of [N, *spatial, C], in the dtype of the mean.

    Args:
      x: features.
      mean: [N or 1, C], as is the factor.
      factor: the scale over the standard deviation.
      bias: [C].
      negative_slope: as of `normalize`.
    """
    y = _affine(x, mean, factor, bias)
    return _where_negative(y, y, negative_slope)


def _affine(x, mean, factor, bias):
    return (x.astype(mean.dtype) - _spread(mean, x)) * _spread(factor, x) + bias


def _where_negative(y, values, slope: float):
    """Values, times the slope where y is not positive."""
    if slope == 1:
        return values
    return jnp.where(y > 0, values, slope * values if slope else 0)


def _spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """[N or 1, C] in the shape of x."""
    return values.reshape(-1, *(1,) * (x.ndim - 2), values.shape[-1])
