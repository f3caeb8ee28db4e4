"""Normalisation by the statistics of an array itself, with few passes over memory."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.once import once

# XLA:CPU turns sums over more terms than this into windows, which it computes slowly.
TERMS = 32


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
        normalisation), or of all (Ioffe & Szegedy 2015, batch normalisation).
      negative_slope: what negative results are multiplied by: 0 for ReLU, 1 for none.
      moments: mean and variance of x as below, if they are known already; the gradient is the same.

    Returns:
      The result, in x's dtype; its mean and its biased variance, both [N, C] if per sample, else
      [1, C], in float32 or wider, as is what is computed on the way.
    """
    return _normalize(x, scale, bias, epsilon, per_sample, negative_slope, moments)[0]


def _normalize(x, scale, bias, epsilon, per_sample, negative_slope, moments):
    mean, var = moments or _moments(x, per_sample)
    rstd = lax.rsqrt(var + epsilon)

    def apply(x, mean, factor, bias):
        y = _affine(x, mean, factor, bias)
        return _where_negative(y, y, negative_slope).astype(x.dtype)

    y = once(apply, mean, x, mean, rstd * scale, bias)
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

    grad_sum, scaled_sum = _sums(terms, (x, grad), (mean, rstd * scale, bias), per_sample)
    scaled_sum *= rstd
    centred = (2 * var_grad - jnp.square(rstd) * scale * scaled_sum) / count
    constant = (mean_grad - rstd * scale * grad_sum) / count

    def combine(x, grad, mean, factor, bias, centred, constant):
        grad = before(x, grad, mean, factor, bias) * _spread(factor, x)
        centred_x = x.astype(mean.dtype) - _spread(mean, x)
        grad += centred_x * _spread(centred, x) + _spread(constant, x)
        return grad.astype(x.dtype)

    x_grad = once(combine, mean, x, grad, mean, rstd * scale, bias, centred, constant)
    return x_grad, scaled_sum.sum(0), grad_sum.sum(0), None


normalize.defvjp(_normalize, _normalize_bwd)


def channel_sums(x: jax.Array) -> jax.Array:
    """Sums over all axes but the last, [N, *spatial, C] -> [C], in float32 or wider."""
    wide = at_least_float32(x.dtype)
    return _sums(lambda x: (x.astype(wide),), (x,), (), False)[0][0]


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


def _moments(x: jax.Array, per_sample: bool) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance, [N or 1, C]."""
    moments = {"cpu": _moments_by_slabs, "default": _moments_at_once}
    mean, var = lax.platform_dependent(x, **moments)  # [N, C]
    if per_sample:
        return mean, var
    overall = mean.mean(0, keepdims=True)
    return overall, (var + jnp.square(mean - overall)).mean(0, keepdims=True)


def _moments_at_once(x):
    x = x.astype(at_least_float32(x.dtype))
    axes = tuple(range(1, x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.square(x - _spread(mean, x)).mean(axes)


def _moments_by_slabs(x):
    """The same from the moments of slabs, with sums of few terms."""
    slabs = _slabs(x).astype(at_least_float32(x.dtype))  # [N, slabs, rows, width]
    count = slabs.shape[2]
    means = lax.optimization_barrier(slabs.sum(2) / count)
    squares = jnp.square(slabs - means[:, :, None]).sum(2)
    n, features = x.shape[0], x.shape[-1]
    groups = means.size // n // features
    means, squares = (a.reshape(n, groups, features) for a in (means, squares))
    mean = _sum_in_stages(means) / groups
    between = _sum_in_stages(jnp.square(means - mean[:, None]))  # Chan et al. 1983
    return mean, (_sum_in_stages(squares) / count + between) / groups


def _sums(terms, arrays, values, per_sample: bool) -> tuple[jax.Array, ...]:
    """Sums over all but the channels of what `terms(*arrays, *values)` gives: [N or 1, C] each.

    `terms` takes arrays [N, *, C] and values [N or 1, C] or [C].
    """

    def at_once(*operands):
        return tuple(term.sum(tuple(range(1, term.ndim - 1))) for term in terms(*operands))

    def by_slabs(*operands):
        arrays_, values_ = operands[: len(arrays)], operands[len(arrays) :]
        n, features = arrays_[0].shape[0], arrays_[0].shape[-1]
        slabs = [_slabs(array) for array in arrays_]
        _, count, rows, width = slabs[0].shape
        shape = (n, count, rows, width // features, features)
        found = terms(*(slab.reshape(shape) for slab in slabs), *values_)
        return tuple(_sum_in_stages(f.sum(2).reshape(n, -1, features)) for f in found)

    sums = lax.platform_dependent(*arrays, *values, cpu=by_slabs, default=at_once)
    return sums if per_sample else tuple(s.sum(0, keepdims=True) for s in sums)


def _slabs(x: jax.Array) -> jax.Array:
    """[N, *spatial, C] -> [N, slabs, rows, last axes], few rows a slab."""
    n, *spatial, features = x.shape
    width = (spatial or [1])[-1] * features
    rows = math.prod(spatial[:-1])
    return x.reshape(n, -1, _divisor(rows), width)


def _divisor(count: int) -> int:
    return max(k for k in range(1, TERMS + 1) if count % k == 0)


def _sum_in_stages(x: jax.Array) -> jax.Array:
    """[N, groups, C] -> [N, C], in stages of few terms.

    XLA:CPU adds terms one after the other: over the voxels of a volume that costs float32 half of
    its digits. The batch stays an axis: devices that share it exchange nothing but the sum.
    """
    n, _, features = x.shape
    while (terms := x.shape[1]) > 1:
        part = _divisor(terms)
        part = terms if part == 1 else part
        # The barrier keeps XLA from making one long sum of two stages again.
        x = lax.optimization_barrier(x.reshape(n, terms // part, part, features).sum(2))
    return x.reshape(n, features)
