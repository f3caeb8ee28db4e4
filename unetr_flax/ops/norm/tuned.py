"""Normalization by an array's own statistics, with few passes over memory."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.materialize import materialize
from unetr_flax.ops.norm import tpu_in_place
from unetr_flax.ops.platform import by_platform
from unetr_flax.ops.reductions import sum_terms
from unetr_flax.ops.sharding import elementwise


@functools.partial(custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    per_sample: bool,
    negative_slope: float,
    moments: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Computes LeakyReLU((x - mean) / sqrt(var + epsilon) * scale + bias), channel by channel.

    Args:
      x: [N, *spatial, C].
      scale: [C].
      bias: [C].
      epsilon: number added to the variance.
      per_sample: whether mean and variance are those of each sample, or of all.
      negative_slope: factor on negative results: 0 for ReLU, 1 for none.
      moments: mean and biased variance of x by `reductions.moments`. The gradient with respect to x
        includes the one through them.

    Returns:
      The result, in x's dtype; the computation is in the dtype of the moments.
    """
    return _normalize(x, scale, bias, epsilon, per_sample, negative_slope, moments)[0]


def _normalize(x, scale, bias, epsilon, per_sample, negative_slope, moments):
    mean, var = moments
    rstd = lax.rsqrt(var + epsilon)

    def apply(x, mean, factor, bias):
        return affine(x, mean, factor, bias, negative_slope).astype(x.dtype)

    y = materialize(apply, mean, x, mean, rstd * scale, bias)
    return y, (x, scale, bias, mean, rstd)


def _normalize_bwd(epsilon, per_sample, negative_slope, residuals, grad):
    x, scale, bias, mean, rstd = residuals
    count = math.prod(x.shape[1:-1]) * (1 if per_sample else x.shape[0])

    def before(x, grad, mean, factor, bias):
        """Returns the gradient before LeakyReLU."""
        grad = grad.astype(mean.dtype)
        return _where_negative(_affine(x, mean, factor, bias), grad, negative_slope)

    def terms(x, grad, mean, factor, bias):
        grad = before(x, grad, mean, factor, bias)
        return grad, grad * (x.astype(mean.dtype) - _spread(mean, x))

    values = mean, rstd * scale, bias
    grad_sum, scaled_sum = sum_terms(terms, (x, grad), values, per_sample)
    scaled_sum *= rstd
    centered = -jnp.square(rstd) * scale * scaled_sum / count
    constant = -rstd * scale * grad_sum / count

    def combine(x, grad, mean, factor, bias, centered, constant):
        grad = before(x, grad, mean, factor, bias) * _spread(factor, x)
        centered_x = x.astype(mean.dtype) - _spread(mean, x)
        grad += centered_x * _spread(centered, x) + _spread(constant, x)
        return grad.astype(x.dtype)

    operands = (x, grad, mean, rstd * scale, bias, centered, constant)
    compute = functools.partial(
        by_platform,
        tpu=functools.partial(tpu_in_place.elementwise, combine),
        default=lambda x, grad, mean, *rest: materialize(combine, mean, x, grad, mean, *rest),
    )
    # On TPU the parts of a volume are slices, which are those of one device.
    x_grad = elementwise(compute, *operands)
    return x_grad, scaled_sum.sum(0), grad_sum.sum(0), None


normalize.defvjp(_normalize, _normalize_bwd)


def affine(
    x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array, negative_slope: float
) -> jax.Array:
    """Computes LeakyReLU((x - mean) * factor + bias), in the dtype of the mean.

    Args:
      x: [N, *spatial, C].
      mean: [N or 1, C].
      factor: scale over standard deviation, [N or 1, C].
      bias: [C].
      negative_slope: see `normalize`.
    """
    y = _affine(x, mean, factor, bias)
    return _where_negative(y, y, negative_slope)


def _affine(x, mean, factor, bias):
    return (x.astype(mean.dtype) - _spread(mean, x)) * _spread(factor, x) + bias


def _where_negative(y, values, slope: float):
    """Returns values, times the slope where y is not positive."""
    if slope == 1:
        return values
    return jnp.where(y > 0, values, slope * values if slope else 0)


def _spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns [N or 1, C] with as many axes as x."""
    return values.reshape(-1, *(1,) * (x.ndim - 2), values.shape[-1])
