"""Sliding-window inference: a model of one fixed input size applied to volumes of any size."""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from jax.typing import ArrayLike

from unetr_flax.imaging.padding import centered_start, crop_or_pad

# Lower bound of the gaussian weights, as in MONAI: no voxel is divided by nearly zero.
MIN_WEIGHT = 1e-3


def sliding_window_inference(
    volume: ArrayLike,
    roi_size: Sequence[int],
    predictor: Callable[[np.ndarray], jax.Array | np.ndarray],
    overlap: float = 0.25,
    mode: Literal["constant", "gaussian"] = "constant",
    sigma_scale: float = 0.125,
    batch_size: int = 4,
) -> np.ndarray:
    """Segments volumes window by window and blends the windows where they overlap.

    Windows start every max(1, int(roi * (1 - overlap))) voxels, except that the last one of an axis
    ends with the volume. The logits of a voxel are the weighted mean over the windows that contain
    it. An axis shorter than the window is padded with zeros on both sides, the odd voxel at the
    end, and cropped back. Windows and weights are those of MONAI's `sliding_window_inference`
    (Cardoso et al. 2022, "MONAI: An open-source framework for deep learning in healthcare").

    The predictor is always called with the same shape, and the last batch is filled up with zeros:
    a jitted predictor compiles once for volumes of all shapes. Logits are gathered on the host
    while the device works on the next batch, so the device holds two batches, never the volume.

    Args:
      volume: images [B, *spatial, C], with any number of spatial axes.
      roi_size: size of the window, in voxels per spatial axis.
      predictor: maps windows [batch_size, *roi_size, C] to logits [batch_size, *roi_size, K].
      overlap: fraction of the window that neighbors share, in [0, 1).
      mode: weights of the voxels of a window: "constant", or "gaussian" with the highest weight at
        the center.
      sigma_scale: standard deviation of the gaussian, as a fraction of the window's size.
      batch_size: windows per call of the predictor.

    Returns:
      Logits [B, *spatial, K] on the host, with the predictor's dtype but at least float32.

    Raises:
      ValueError: if an argument has a bad value, or the predictor returns another shape.
    """
    volume = np.asarray(volume)
    if volume.ndim < 3 or 0 in volume.shape:
        raise ValueError(
            f"volume: shape {volume.shape}, must be [B, *spatial, C] with at least one spatial "
            "axis and no axis of length 0"
        )
    spatial = volume.shape[1:-1]
    roi = _window_size(roi_size, spatial)
    batch_size = _positive_integer("batch_size", batch_size)
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap!r}: must be in [0, 1)")
    importance = _importance(roi, mode, sigma_scale)

    padded = tuple(max(s, r) for s, r in zip(spatial, roi, strict=True))
    start = centered_start(spatial, padded)
    volume = crop_or_pad(volume, (0, *start), (len(volume), *padded))
    windows = _windows(volume.shape[1:-1], roi, overlap)
    places = [(b, *window) for b in range(len(volume)) for window in windows]
    batches = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]

    def predict(batch):
        # Each batch needs a new array, since the device may still read the previous one.
        inputs = np.zeros((batch_size, *roi, volume.shape[-1]), volume.dtype)
        for i, place in enumerate(batch):
            inputs[i] = volume[place]
        outputs = predictor(inputs)
        if outputs.ndim != volume.ndim or outputs.shape[:-1] != (batch_size, *roi):
            raise ValueError(
                f"predictor: returned shape {outputs.shape}, must be "
                f"({', '.join(map(str, (batch_size, *roi)))}, K)"
            )
        return outputs

    pending = predict(batches[0])
    dtype = np.promote_types(pending.dtype, np.float32)
    importance = importance.astype(dtype)[..., None]
    total = np.zeros((*volume.shape[:-1], pending.shape[-1]), dtype)
    for i, batch in enumerate(batches):
        outputs = pending
        # The next batch is dispatched first, so that device and host work at the same time.
        if i + 1 < len(batches):
            pending = predict(batches[i + 1])
        for place, logits in zip(batch, np.asarray(outputs), strict=False):
            total[place] += logits if mode == "constant" else logits * importance

    weight = np.zeros((*volume.shape[1:-1], 1), dtype)
    for window in windows:
        weight[window] += importance
    total /= weight
    return crop_or_pad(total, (0, *(-s for s in start)), (len(total), *spatial))


def _windows(spatial: Sequence[int], roi: Sequence[int], overlap: float) -> list[tuple[slice, ...]]:
    """Lists the windows that cover a volume, the last axis fastest.

    Args:
      spatial: voxels of the volume per axis, at least those of the window.
      roi: voxels of the window per axis.
      overlap: fraction of the window that neighbors share.
    """
    axes = []
    for size, length in zip(spatial, roi, strict=True):
        interval = max(1, int(length * (1 - overlap)))
        last = size - length
        starts = [min(i * interval, last) for i in range(math.ceil(last / interval) + 1)]
        axes.append([slice(start, start + length) for start in starts])
    return list(itertools.product(*axes))


def _importance(roi: Sequence[int], mode: str, sigma_scale: float) -> np.ndarray:
    """Computes the weight of each voxel of a window, [*roi]."""
    if mode == "constant":
        return np.ones(roi)
    if mode != "gaussian":
        raise ValueError(f'mode={mode!r}: must be "constant" or "gaussian"')
    if not 0 < sigma_scale < math.inf:
        raise ValueError(f"sigma_scale={sigma_scale!r}: must be above 0 and finite")
    importance = np.ones(())
    for length in roi:
        distance = np.arange(length) - (length - 1) / 2
        profile = np.exp(-0.5 * (distance / (sigma_scale * length)) ** 2)
        importance = importance[..., None] * profile
    return np.maximum(importance, MIN_WEIGHT)


def _window_size(roi_size: Sequence[int], spatial: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(roi_size, Sequence) or len(roi_size) != len(spatial):
        raise ValueError(
            f"roi_size={roi_size!r}: must be {len(spatial)} positive integers, one for each "
            f"spatial axis of the volume {tuple(spatial)}"
        )
    return tuple(_positive_integer("roi_size", length) for length in roi_size)


def _positive_integer(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}: {value!r}, must be a positive integer")
    return number
