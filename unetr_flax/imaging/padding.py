"""Boxes cut out of an array, which may reach beyond its edges."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def crop_or_pad(
    array: np.ndarray, start: Sequence[int], size: Sequence[int], fill: ArrayLike = 0
) -> np.ndarray:
    """Cuts the box [start, start + size) out of the leading axes of an array.

    The inverse is the same function: with the negated start and the shape of the original, the
    part of the original that the box holds comes back to its place.

    Args:
      array: [*spatial, ...]; the axes after the box's are kept whole.
      start: first index of the box per leading axis; may be negative or beyond the end.
      size: length of the box per leading axis.
      fill: value of what lies outside the array: a number, or an array that broadcasts against the
        axes after the box's, such as one number per channel.

    Returns:
      An array [*size, ...] of the same dtype: a view if the box lies inside the array, else a copy.
    """
    shape = array.shape[: len(size)]
    source, target = [], []
    for first, length, axis in zip(start, size, shape, strict=True):
        low, high = (min(max(edge, 0), axis) for edge in (first, first + length))
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    inside = array[tuple(source)]
    if inside.shape[: len(size)] == tuple(size):
        return inside
    box = np.empty((*size, *array.shape[len(size) :]), array.dtype)
    box[...] = fill
    box[tuple(target)] = inside
    return box


def centered_start(shape: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Computes where a box of a given size starts that has the same center as an array.

    Where the two centers cannot coincide, the odd voxel is cut off or filled in at the end.

    Args:
      shape: lengths of the array's axes.
      size: lengths of the box; negative starts are those of axes that the box exceeds.
    """
    return tuple(
        (axis - length) // 2 if axis >= length else -((length - axis) // 2)
        for axis, length in zip(shape, size, strict=True)
    )
