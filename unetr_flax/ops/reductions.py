"""Sums over the voxels of a volume or the weights of a model, in few passes over memory.

XLA:CPU sums along an axis one number after the other. That is slow, and over the voxels of a volume
it costs float32 half of its digits. Sums of whole arrays are vectorized. So on CPU rows are summed
as arrays first, then the result in stages of few terms.
"""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops import sharding as sharded
from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.platform import by_platform

# Maximum number of rows that are summed as arrays, in one pass.
ROWS = 8

# Arrays of up to this many numbers count as small in `global_norm`.
SMALL = 2**14

# XLA:CPU turns sums over more terms than this into windows, which it computes slowly.
TERMS = 32


def sum_terms(
    terms: Callable[..., tuple[jax.Array, ...]],
    arrays: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    per_sample: bool,
) -> tuple[jax.Array, ...]:
    """Sums the arrays that `terms(*arrays, *values)` returns over all axes but the channels.

    Args:
      terms: elementwise; takes the arrays with their spatial axes in any shape.
      arrays: [N, *spatial, C] each.
      values: [N or 1, C] or [C] each.
      per_sample: whether to sum over each sample separately.

    Returns:
      [N, C] each if per sample, else [1, C].
    """

    def directly(*operands):
        return tuple(term.sum(tuple(range(1, term.ndim - 1))) for term in terms(*operands))

    def by_slabs(*operands):
        arrays_, values_ = operands[: len(arrays)], operands[len(arrays) :]
        n, features = arrays_[0].shape[0], arrays_[0].shape[-1]
        slabs = [_slabs(array) for array in arrays_]
        _, count, rows, width = slabs[0].shape
        shape = (n, count, rows, width // features, features)
        found = terms(*(slab.reshape(shape) for slab in slabs), *values_)
        groups = count * width // features
        return tuple(_sum_in_stages(_sum_of_rows(f).reshape(n, groups, features)) for f in found)

    def by_sample(*operands):
        return by_platform(*operands, cpu=by_slabs, default=directly)

    if (sharding := sharded.active()) is not None:
        batch = arrays[0].shape[0]
        takes = tuple(sharding.spec(x, batch) for x in (*arrays, *values))
        by_sample = _totals(by_sample, sharding, takes)
    found = by_sample(*arrays, *values)
    return found if per_sample else tuple(f.sum(0, keepdims=True) for f in found)


def channel_sums(x: jax.Array) -> jax.Array:
    """Sums over all axes but the last, [N, *spatial, C] -> [C], in float32 or wider."""
    wide = at_least_float32(x.dtype)
    return sum_terms(lambda x: (x.astype(wide),), (x,), (), False)[0][0]


@functools.partial(custom_vjp, nondiff_argnums=(1,))
def moments(x: jax.Array, per_sample: bool) -> tuple[jax.Array, jax.Array]:
    """Computes mean and biased variance of [N, *spatial, C], in float32 or wider.

    Args:
      x: features.
      per_sample: whether to compute the moments of each sample separately.

    Returns:
      [N, C] each if per sample, else [1, C].
    """
    mean, var = _moments_by_sample(x)  # [N, C]
    if per_sample:
        return mean, var
    overall = mean.mean(0, keepdims=True)
    return overall, (var + jnp.square(mean - overall)).mean(0, keepdims=True)


def _totals(by_sample, sharding, takes):
    """Adds up sums [N, C] over the devices that share a volume."""
    return sharded.by_shard(
        lambda *operands: sharding.total(by_sample(*operands)), sharding, takes, sharding.sample
    )


def _moments_by_sample(x):
    """Computes mean and biased variance of each sample, [N, C] each."""
    sharding = sharded.active()
    if sharding is None:
        return _mean_and_variance(x, lambda mean: mean)

    def on_shard(x):
        # All devices that share a volume have equally many slices of it.
        return _mean_and_variance(x, lambda mean: sharding.total(mean) / sharding.count)

    return sharded.by_shard(on_shard, sharding, sharding.volume, sharding.sample)(x)


def _mean_and_variance(x, overall):
    """Computes both by means of this device's slices, each of which `overall` makes one of all."""
    platforms = {"cpu": _moments_by_slabs, "default": _moments_directly}
    branches = {name: functools.partial(f, overall=overall) for name, f in platforms.items()}
    return by_platform(x, **branches)


def _moments_forward(x, per_sample):
    mean, var = moments(x, per_sample)
    return (mean, var), (x, mean)


def _moments_backward(per_sample, residuals, grads):
    x, mean = residuals
    count = math.prod(x.shape[1:-1]) * (1 if per_sample else x.shape[0])
    mean, mean_grad, var_grad = (
        value.reshape(-1, *(1,) * (x.ndim - 2), x.shape[-1]) for value in (mean, *grads)
    )
    grad = (mean_grad + 2 * var_grad * (x.astype(mean.dtype) - mean)) / count
    return (grad.astype(x.dtype),)


moments.defvjp(_moments_forward, _moments_backward)


def global_norm(tree: Any) -> jax.Array:
    """Computes the Euclidean norm of all numbers of a tree, [], in float32 or wider."""
    leaves = jax.tree.leaves(tree)
    if sharded.active() is not None:
        # Reshaping an array that is split over devices would gather it.
        return jnp.sqrt(_square_sum_directly(*leaves))
    platforms = {"cpu": _square_sum_by_rows, "default": _square_sum_directly}
    return jnp.sqrt(by_platform(*leaves, **platforms))


def _square_sum_directly(*leaves):
    return sum(jnp.square(_wide(leaf)).sum() for leaf in leaves)


def _square_sum_by_rows(*leaves):
    large, small = [], collections.defaultdict(list)
    for leaf in leaves:
        squares = jnp.square(_wide(leaf))
        if leaf.size <= SMALL:
            small[leaf.size].append(squares.reshape(-1))
        else:
            large.append(_rows(squares.reshape(_divisor(leaf.size, ROWS), -1), 0))
    # Small leaves of equal size are added first, since a hundred single sums take long to compile.
    return sum(_added(rows).sum() for rows in (*large, *small.values()))


def _moments_directly(x, overall):
    x = _wide(x)
    axes = tuple(range(1, x.ndim - 1))
    mean = overall(x.mean(axes, keepdims=True))
    return mean.reshape(-1, x.shape[-1]), overall(jnp.square(x - mean).mean(axes))


def _moments_by_slabs(x, overall):
    slabs = _wide(_slabs(x))  # [N, slabs, rows, width]
    n, features = x.shape[0], x.shape[-1]
    voxels = math.prod(x.shape[1:-1])
    groups = slabs.shape[1] * slabs.shape[3] // features

    def mean(slabs):
        total = _sum_in_stages(_sum_of_rows(slabs).reshape(n, groups, features))
        return overall(total / voxels)

    center = mean(slabs)
    by_channel = slabs.reshape(*slabs.shape[:3], slabs.shape[3] // features, features)
    centered = by_channel - center[:, None, None, None]
    return center, mean(jnp.square(centered).reshape(slabs.shape))


def _slabs(x: jax.Array) -> jax.Array:
    """Reshapes [N, *spatial, C] to [N, slabs, rows, last axis * C], with few rows per slab."""
    n, *spatial, features = x.shape
    width = (spatial or [1])[-1] * features
    lines = math.prod(spatial[:-1])
    rows = _divisor(lines, ROWS)
    return x.reshape(n, lines // rows, rows, width)


@jax.jit
def _sum_of_rows(slabs: jax.Array) -> jax.Array:
    """Computes [N, slabs, rows, *] -> [N, slabs, *]."""
    return _added(_rows(slabs, 2))


def _rows(x: jax.Array, axis: int) -> list[jax.Array]:
    """Returns the slices along an axis; indexing would take several times longer to trace."""
    return [lax.index_in_dim(x, row, axis, keepdims=False) for row in range(x.shape[axis])]


def _added(rows: list[jax.Array]) -> jax.Array:
    return functools.reduce(lax.add, rows)


@jax.jit
def _sum_in_stages(x: jax.Array) -> jax.Array:
    """Computes [N, groups, C] -> [N, C], in stages of few terms.

    The batch stays an axis, so devices that share a batch exchange nothing but the sum.
    """
    n, _, features = x.shape
    while (terms := x.shape[1]) > 1:
        part = _divisor(terms, TERMS)
        part = terms if part == 1 else part
        # The barrier prevents XLA from fusing two stages into one long sum.
        x = lax.optimization_barrier(x.reshape(n, terms // part, part, features).sum(2))
    return x.reshape(n, features)


def _divisor(count: int, limit: int) -> int:
    return max(k for k in range(1, limit + 1) if count % k == 0)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(at_least_float32(x.dtype))
