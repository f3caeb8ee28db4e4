"""Elementwise operations on large arrays on TPU that reuse the memory of an operand."""

import math
from collections.abc import Callable

import jax
from jax import lax

# Bytes of one volume's part; smaller volumes are computed whole.
PART_BYTES = 2**26


def elementwise(
    compute: Callable[..., jax.Array], x: jax.Array, y: jax.Array, *values: jax.Array
) -> jax.Array:
    """Computes `compute(x, y, *values)`, for a large y part by part in y's memory.

    Without the parts, the TPU's compiler allocates new memory for the result. The memory of y is
    reused if no later operation reads y.

    Args:
      compute: elementwise function; also takes parts [N, part, *spatial, C] of x and y.
      x: [N, D, *spatial, C].
      y: the same shape; the result has its dtype.
      *values: further arguments, the same for all parts.
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
    """Returns the slices per part, a divisor of the depth; None if a volume is small enough.

    A part has slices of all volumes, since devices may share the batch.
    """
    depth = y.shape[1]
    slice_bytes = math.prod(y.shape[2:]) * y.dtype.itemsize
    if y.ndim < 4 or depth * slice_bytes <= PART_BYTES:
        return None
    sizes = [size for size in range(1, depth + 1) if depth % size == 0]
    return max((size for size in sizes if size * slice_bytes <= PART_BYTES), default=1)
