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
    columns = gather(jnp.zeros(shape, dtype), 0)
    if count == 1:
        return product(columns, 0)

    def add_pair(carry, i):
        total, even, odd = carry
        odd = gather(odd, 2 * i + 1)
        total += product(even, 2 * i)
        even = gather(even, 2 * i + 2)  # past the end nobody reads it
        total += product(odd, 2 * i + 1)
        return (total, even, odd), None

    zero = jnp.zeros_like(jax.eval_shape(product, columns, 0))
    start = (zero, columns, jnp.zeros(shape, dtype))
    (total, even, _), _ = lax.scan(add_pair, start, jnp.arange(count // 2))
    return total + product(even, count - 1) if count % 2 else total
