"""Elementwise operations on large arrays on TPU, whose compiler gives their results memory anew."""

from collections.abc import Callable

import jax
from jax import lax

# Bytes of a volume's part; what has no more is computed at once.
PART_BYTES = 2**26


def elementwise(
    compute: Callable[..., jax.Array], x: jax.Array, y: jax.Array, *values: jax.Array
) -> jax.Array:
    """`compute(x, y, *values)` in the memory of y, part by part, if y is large and then unused.

    Args:
      compute: elementwise; takes x and y as [N, part, *spatial, C] too.
      x: [N, D, *spatial, C].
      y: the same shape; the result has its dtype.
      values: what is the same for all parts.
    """
    size = part_size(y)
    if size is None:
        return compute(x, y, *values)

    def of_part(index, y):
        start = index * size
        parts = (lax.dynamic_slice_in_dim(array, start, size, 1) for array in (x, y))
        part = compute(*parts, *values).astype(y.dtype)
        return lax.dynamic_update_slice_in_dim(y, part, start, 1)

    return lax.fori_loop(0, y.shape[1] // size, of_part, y)


def part_size(y: jax.Array) -> int | None:
    """Slices per part, a divisor of the depth; None if a volume is small enough.

    A part has slices of all volumes, as those may be shared by devices.
    """
    n, depth = y.shape[:2]
    slice_bytes = y.size // n // depth * y.dtype.itemsize
    if y.ndim < 4 or depth * slice_bytes <= PART_BYTES:
        return None
    sizes = [size for size in range(1, depth + 1) if depth % size == 0]
    return max((size for size in sizes if size * slice_bytes <= PART_BYTES), default=1)
