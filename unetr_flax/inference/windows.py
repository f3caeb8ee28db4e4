"""Windows that cover a volume, and the weights of their voxels."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Mode = Literal["constant", "gaussian"]

# Lower bound of the gaussian weights, as in MONAI: no voxel is divided by nearly zero.
MIN_WEIGHT = 1e-3


def window_size(roi_size: Any, spatial: Sequence[int]) -> tuple[int, ...]:
    """Reads the size of the window.

    Args:
      roi_size: one number for all axes, or one per axis as a sequence or array. None, 0 and
        negative numbers stand for the whole axis.
      spatial: voxels of the volume per axis.

    Raises:
      ValueError: if it is something else, or has another number of axes.
    """
    given = roi_size.tolist() if isinstance(roi_size, np.ndarray) else roi_size
    if given is None or not isinstance(given, Sequence):
        given = [given] * len(spatial)
    try:
        lengths = [0 if length is None else operator.index(length) for length in given]
    except TypeError:
        lengths = []
    if len(lengths) != len(spatial):
        raise ValueError(
            f"roi_size={roi_size!r}: must be an integer, or {len(spatial)} integers, one for each "
            f"spatial axis of the volume {tuple(spatial)}; -1 or None is the whole axis"
        )
    return tuple(
        length if length > 0 else axis for length, axis in zip(lengths, spatial, strict=True)
    )


def per_axis(name: str, value: Any, axes: int, low: float, high: float) -> tuple[float, ...]:
    """Reads one number for all axes or one per axis, each in [0, 1) or another range.

    Args:
      name: name of the argument, for the message.
      value: a number, or a sequence or array of them.
      axes: number of axes.
      low: the lowest number that is allowed, or 0 for any above 0.
      high: upper bound, itself not allowed.

    Raises:
      ValueError: if the numbers are not in the range, or not as many as axes.
    """
    values = np.ravel(value) if np.ndim(value) < 2 else np.zeros(0)
    inside = values.dtype.kind in "iuf" and bool(np.all((values >= low) & (values < high)))
    if not inside or len(values) not in (1, axes) or (np.ndim(value) and len(values) != axes):
        allowed = f"in [{low:g}, {high:g})" if high < math.inf else "above 0 and finite"
        raise ValueError(f"{name}={value!r}: must be {allowed}, one number or one for each axis")
    return tuple(float(v) for v in np.broadcast_to(values, axes))


def positive_integer(name: str, value: Any) -> int:
    """Reads an integer above 0.

    Raises:
      ValueError: if it is none.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}: {value!r}, must be a positive integer")
    return number


def window_starts(
    spatial: Sequence[int], roi: Sequence[int], overlap: Sequence[float]
) -> list[list[int]]:
    """Computes where windows start along each axis, as MONAI does.

    They start every max(1, int(roi * (1 - overlap))) voxels, except that the last one of an axis
    ends with the volume.

    Args:
      spatial: voxels of the volume per axis, at least those of the window.
      roi: voxels of the window per axis.
      overlap: fraction of the window that neighbors share, per axis.
    """
    axes = []
    for size, length, shared in zip(spatial, roi, overlap, strict=True):
        interval = max(1, int(length * (1 - shared)))
        last = size - length
        axes.append([min(i * interval, last) for i in range(math.ceil(last / interval) + 1)])
    return axes


def places(starts: Sequence[Sequence[int]], roi: Sequence[int]) -> list[tuple[slice, ...]]:
    """Lists all windows as slices, the last axis fastest."""
    axes = [
        [slice(start, start + length) for start in axis]
        for axis, length in zip(starts, roi, strict=True)
    ]
    return list(itertools.product(*axes))


def importance(roi: Sequence[int], mode: Mode, sigma_scale: Sequence[float]) -> np.ndarray:
    """Computes the weight of each voxel of a window, [*roi], float64.

    Args:
      roi: voxels of the window per axis.
      mode: "constant", or "gaussian" with the highest weight at the center.
      sigma_scale: standard deviation of the gaussian as a fraction of the window, per axis.

    Raises:
      ValueError: if the mode is unknown.
    """
    if mode == "constant":
        return np.ones(roi)
    if mode != "gaussian":
        raise ValueError(f'mode={mode!r}: must be "constant" or "gaussian"')
    weights = np.ones(())
    for length, scale in zip(roi, sigma_scale, strict=True):
        distance = np.arange(length) - (length - 1) / 2
        profile = np.exp(-0.5 * (distance / (scale * length)) ** 2)
        weights = weights[..., None] * profile
    return np.maximum(weights, MIN_WEIGHT)
