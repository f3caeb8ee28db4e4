"""Sums of products over the slices of a volume."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def sum_of_products(
    count: int,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    gather: Callable[[jax.Array, jax.Array | int], jax.Array],
    product: Callable[[jax.Array, jax.Array | int], jax.Array],
) -> jax.Array:
    """The sum of `product(columns of slice i, i)` for i below `count`.

    Two arrays of columns take turns: a CPU copies those of a slice, which keeps one core busy,
    while it multiplies those of the slice before. Both stay where they are, and in the caches.

    Args:
      count: number of slices.
      shape: of one slice's columns.
      dtype: of the columns.
      gather: (columns, i) -> the columns of slice i, written over all that was in `columns`.
      product: (columns of slice i, i) -> what is added up.
    """

    def add_pair(carry, i):
        total, even, odd = carry
        odd = gather(odd, 2 * i)
        total += product(even, 2 * i - 1)  # of zeros at first
        even = gather(even, 2 * i + 1)
        total += product(odd, 2 * i)
        return (total, even, odd), None

    columns = jnp.zeros(shape, dtype)
    pairs = count // 2
    total = jnp.zeros_like(jax.eval_shape(product, columns, 0))
    if pairs:
        start = (total, columns, columns)
        (total, columns, _), _ = lax.scan(add_pair, start, jnp.arange(pairs))
        total += product(columns, 2 * pairs - 1)
    return total + product(gather(columns, count - 1), count - 1) if count % 2 else total
