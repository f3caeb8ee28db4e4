"""Sliding-window inference: a model of one fixed input size applied to volumes of any size."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import ArrayLike

from unetr_flax.imaging.padding import centered_start
from unetr_flax.inference import windows
from unetr_flax.inference.accumulators import Accumulator, Place, make_accumulator

PaddingMode = Literal["constant", "reflect", "replicate", "circular"]
# The same modes in NumPy's words.
_NUMPY_MODES = {
    "constant": "constant",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}
# A volume with at most as many entries along its second axis may have channels there.
_FEW_CHANNELS = 4


def sliding_window_inference(
    volume: ArrayLike,
    roi_size: int | Sequence[int | None] | np.ndarray | None,
    predictor: Callable[[np.ndarray], Any],
    overlap: float | Sequence[float] = 0.25,
    mode: windows.Mode = "constant",
    sigma_scale: float | Sequence[float] = 0.125,
    batch_size: int = 4,
    *,
    padding_mode: PaddingMode = "constant",
    cval: float = 0.0,
    accumulate: Place = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Segments volumes window by window and blends the windows where they overlap.

    Windows start every max(1, int(roi * (1 - overlap))) voxels, except that the last one of an axis
    ends with the volume. The logits of a voxel are the weighted mean over the windows that contain
    it. An axis shorter than the window is padded on both sides, the odd voxel at the end, and
    cropped back. Windows, weights and arguments are those of MONAI's `sliding_window_inference`
    (Cardoso et al. 2022, "MONAI: An open-source framework for deep learning in healthcare").

    The predictor is always called with the same shape, and the last batch is filled up with zeros:
    a jitted predictor compiles once for volumes of all shapes that have at least `batch_size`
    windows. One batch is computed while another is added up.

    Memory: the padded volume, two batches of windows and outputs, and for each output array with K
    channels (K + 1) numbers of float32, or of its wider dtype, per voxel; on the device the means
    take K more.

    Args:
      volume: images [B, *spatial, C], with any number of spatial axes.
      roi_size: size of the window in voxels, one number for all axes or one per axis; -1 and None
        stand for the whole axis.
      predictor: maps windows [b, *roi, C] to logits [b, *out, K], or to a tuple or dict of such
        arrays. `out` may differ from `roi`, as where outputs have a lower resolution.
      overlap: fraction of the window that neighbors share, in [0, 1); one number or one per axis.
      mode: weights of the voxels of a window: "constant", or "gaussian" with the highest weight at
        the center.
      sigma_scale: standard deviation of the gaussian, as a fraction of the window's size; one
        number or one per axis.
      batch_size: windows per call of the predictor.
      padding_mode: what fills an axis that is shorter than the window: `cval` ("constant"), the
        volume mirrored ("reflect"), its outermost voxel ("replicate") or its other end
        ("circular").
      cval: intensity that fills in mode "constant".
      accumulate: where windows are added up: on the "host", on the "device", or chosen from their
        sizes ("auto"): on an accelerator where half of its free memory is enough, else on the host.
      progress: called with the number of windows done and of all windows after each batch.

    Returns:
      Logits [B, *spatial, K] on the host, with the predictor's dtype but at least float32; in a
      tuple or dict if the predictor returns one, with their axes scaled as the predictor's are.

    Raises:
      ValueError: if an argument has a bad value, or the predictor returns something else.
    """
    volume = np.asarray(volume)
    if volume.ndim < 3 or 0 in volume.shape:
        raise ValueError(
            f"volume: shape {volume.shape}, must be [B, *spatial, C] with at least one spatial "
            "axis and no axis of length 0"
        )
    spatial = volume.shape[1:-1]
    roi = windows.window_size(roi_size, spatial)
    _refuse_channels_first(volume.shape, roi)
    batch_size = windows.positive_integer("batch_size", batch_size)
    overlaps = windows.per_axis("overlap", overlap, len(roi), 0, 1)
    sigmas = windows.per_axis("sigma_scale", sigma_scale, len(roi), np.nextafter(0, 1), np.inf)
    weights = windows.importance(roi, mode, sigmas)

    padded = _pad(volume, roi, padding_mode, cval)
    starts = windows.window_starts(padded.shape[1:-1], roi, overlaps)
    corners = list(itertools.product(range(len(padded)), *starts))
    size = min(batch_size, len(corners))
    batches = [corners[i : i + size] for i in range(0, len(corners), size)]
    gathered = _Gathered(padded.shape[:-1], roi, weights, size, accumulate)

    def predict(batch):
        # Each batch needs a new array, since the device may still read the previous one.
        inputs = np.zeros((size, *roi, padded.shape[-1]), padded.dtype)
        for i, (b, *start) in enumerate(batch):
            window = tuple(slice(s, s + r) for s, r in zip(start, roi, strict=True))
            inputs[i] = padded[(b, *window)]
        return predictor(inputs)

    pending = predict(batches[0])
    for i, batch in enumerate(batches):
        outputs = pending
        # The next batch is dispatched first, so that device and host work at the same time.
        if i + 1 < len(batches):
            pending = predict(batches[i + 1])
        gathered.add(batch, outputs)
        if progress is not None:
            progress(min((i + 1) * size, len(corners)), len(corners))
    return gathered.results(spatial)


class _Gathered:
    """The sums of all arrays that a predictor returns, and the structure in which it does."""

    def __init__(self, shape, roi, weights, batch_size, accumulate):
        self._shape, self._roi, self._weights = shape, roi, weights
        self._batch_size, self._accumulate = batch_size, accumulate
        self._sums: list[Accumulator] = []
        self._scales: list[tuple[float, ...]] = []
        self._pack: Callable[[list[np.ndarray]], Any] = lambda arrays: arrays[0]

    def add(self, batch: Sequence[tuple[int, ...]], outputs: Any) -> None:
        arrays, self._pack = _unpack(outputs, self._batch_size, self._roi)
        if not self._sums:
            for array in arrays:
                out = array.shape[1:-1]
                scale = tuple(o / r for o, r in zip(out, self._roi, strict=True))
                part = [int(n * z) for n, z in zip(self._shape[1:], scale, strict=True)]
                self._scales.append(scale)
                self._sums.append(
                    make_accumulator(
                        self._accumulate,
                        (self._shape[0], *part),
                        _nearest(self._weights, out),
                        array,
                    )
                )
        for array, sums, scale in zip(arrays, self._sums, self._scales, strict=True):
            starts = [
                (b, *(int(s * z) for s, z in zip(start, scale, strict=True))) for b, *start in batch
            ]
            sums.add(starts, array)

    def results(self, spatial: Sequence[int]) -> Any:
        """Returns the means without padding, in the predictor's structure."""
        padded = self._shape[1:]
        first = [-start for start in centered_start(spatial, padded)]
        results = []
        for sums, scale in zip(self._sums, self._scales, strict=True):
            means = sums.means(0, int(padded[0] * scale[0]))
            crop = tuple(
                slice(round(f * z), round((f + s) * z)) if s < p else slice(None)
                for f, s, p, z in zip(first, spatial, padded, scale, strict=True)
            )
            results.append(means[(slice(None), *crop)])
        return self._pack(results)


def _unpack(
    outputs: Any, batch_size: int, roi: Sequence[int]
) -> tuple[list[Any], Callable[[list[np.ndarray]], Any]]:
    """Returns the arrays of a predictor's outputs, and what puts others in the same structure."""
    pack: Callable[[list[np.ndarray]], Any]
    if isinstance(outputs, Mapping):
        keys, arrays = list(outputs), list(outputs.values())
        pack = lambda results: dict(zip(keys, results, strict=True))  # noqa: E731
    elif isinstance(outputs, tuple | list):
        arrays, pack = list(outputs), tuple
    else:
        arrays, pack = [outputs], lambda results: results[0]
    for array in arrays:
        if not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(
                f"predictor: returned {_described(outputs)}, must be an array [b, *out, K], or a "
                "tuple or dict of such arrays"
            )
        fits = array.ndim == len(roi) + 2 and len(array) == batch_size and 0 not in array.shape
        if not fits or np.dtype(array.dtype).kind not in "iufV":
            raise ValueError(
                f"predictor: returned shape {array.shape} and dtype {array.dtype}, must be real "
                f"numbers [{batch_size}, *out, K] with {len(roi)} spatial axes, such as "
                f"({', '.join(map(str, (batch_size, *roi)))}, K)"
            )
    if not arrays:
        raise ValueError(f"predictor: returned {_described(outputs)}, must hold an array")
    return arrays, pack


def _described(outputs: Any) -> str:
    if isinstance(outputs, tuple | list):
        return f"a {type(outputs).__name__} of {[type(item).__name__ for item in outputs]}"
    if isinstance(outputs, Mapping):
        return f"a dict of { ({key: type(item).__name__ for key, item in outputs.items()}) }"
    return f"an object of type {type(outputs).__name__}"


def _refuse_channels_first(shape: Sequence[int], roi: Sequence[int]) -> None:
    """Raises if channels seem to lie before the spatial axes, as they do in PyTorch."""
    if shape[1] <= _FEW_CHANNELS and shape[1] < roi[0] // 2 and shape[-1] >= max(roi[-1], 8):
        raise ValueError(
            f"volume: shape {tuple(shape)} seems to have its {shape[1]} channels first, must be "
            f"[B, *spatial, C] with channels last; the window is {tuple(roi)}"
        )


def _pad(
    volume: np.ndarray, roi: Sequence[int], padding_mode: PaddingMode, cval: float
) -> np.ndarray:
    """Pads axes that are shorter than the window, the odd voxel at the end."""
    if padding_mode not in _NUMPY_MODES:
        raise ValueError(f"padding_mode={padding_mode!r}: must be one of {list(_NUMPY_MODES)}")
    missing = [max(r - s, 0) for s, r in zip(volume.shape[1:-1], roi, strict=True)]
    if not any(missing):
        return volume
    widths = [(0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)]
    if padding_mode == "constant":
        return np.pad(volume, widths, constant_values=cval)
    return np.pad(volume, widths, mode=_NUMPY_MODES[padding_mode])  # type: ignore


def _nearest(weights: np.ndarray, out: Sequence[int]) -> np.ndarray:
    """Resamples the weights of a window to the size of an output, to the nearest."""
    indices = [
        ((np.arange(o) + 0.5) * n / o).astype(int) for o, n in zip(out, weights.shape, strict=True)
    ]
    return weights[np.ix_(*indices)]
