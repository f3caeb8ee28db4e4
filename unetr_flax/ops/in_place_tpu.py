"""Elementwise operations on large arrays on TPU, whose compiler gives their results memory anew."""

from collections.abc import Callable

import jax
from jax import lax

# Bytes of a part; what has no more is computed at once.
PART_BYTES = 2**26


def elementwise(
    compute: Callable[..., jax.Array], x: jax.Array, y: jax.Array, *values: jax.Array
) -> jax.Array:
    """`compute(x, y, *values)` in the memory of y, part by part, if y is large and then unused.

    Args:
      compute: elementwise; takes x and y as [1, part, *spatial, C] too.
      x: [N, D, *spatial, C].
      y: the same shape; the result has its dtype.
      values: [1, C] or [C] each; if they have more rows, all is computed at once.
    """
    n, depth = y.shape[:2]
    size = part_size(y)
    if size is None or any(value.ndim > 1 and value.shape[0] > 1 for value in values):
        return compute(x, y, *values)
    rows_x, rows_y = (array.reshape(1, n * depth, *array.shape[2:]) for array in (x, y))

    def of_part(index, rows_y):
        start = index * size
        parts = (lax.dynamic_slice_in_dim(rows, start, size, 1) for rows in (rows_x, rows_y))
        part = compute(*parts, *values).astype(rows_y.dtype)
        return lax.dynamic_update_slice_in_dim(rows_y, part, start, 1)

    return lax.fori_loop(0, n * depth // size, of_part, rows_y).reshape(y.shape)


def part_size(y: jax.Array) -> int | None:
    """Slices of all volumes per part, a divisor of their number; None if all is small enough."""
    slices = y.shape[0] * y.shape[1]
    slice_bytes = y.size // slices * y.dtype.itemsize
    if y.ndim < 4 or slices * slice_bytes <= PART_BYTES:
        return None
    sizes = [size for size in range(1, slices + 1) if slices % size == 0]
    return max((size for size in sizes if size * slice_bytes <= PART_BYTES), default=1)
