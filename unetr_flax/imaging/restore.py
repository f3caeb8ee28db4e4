"""Label maps of a scan from logits on the model's grid, block by block.

Logits of many classes on a scan's own grid would not fit into memory, and most of them would not be
needed: the class of a voxel is that of the largest of its linearly interpolated logits, and where
all logits that are interpolated have the same largest class, it is this class. So only voxels at
the border of two classes are interpolated, and the result is that of interpolating all.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from unetr_flax.imaging.model_grid import ModelGrid

# Numbers that are interpolated at a time, a few arrays of float32 each.
CHUNK_NUMBERS = 2**22


class Restorer:
    """Restores a label map of a scan from blocks of logits that come one after the other.

    Blocks are boxes of the model's grid. A voxel of the scan between two voxels of the model's grid
    is restored from a block that holds both, so blocks must overlap by one voxel.

    Args:
      grid: the model's grid of the scan.
      num_classes: number of classes K.
      probabilities: an array [X, Y, Z, K], in memory or on disk, to fill with the softmax of the
        interpolated logits, or a shorter one for the last classes only; None to restore labels
        only. Outside the model's grid all of it is set to background at once.

    Attributes:
      labels: the label map [X, Y, Z] in the smallest unsigned integers, 0 where nothing was added.
    """

    def __init__(self, grid: ModelGrid, num_classes: int, probabilities: np.ndarray | None = None):
        self._axes = [
            _Axis(fine, coarse) for fine, coarse in zip(grid.box_size, grid.shape, strict=True)
        ]
        self._start = grid.box_start
        self.labels = np.zeros(grid.scan_shape, np.min_scalar_type(num_classes - 1))
        self.probabilities = probabilities
        if probabilities is not None:
            # Blocks fill the box, so only what is around it needs a pass over memory.
            background = np.arange(probabilities.shape[-1]) == probabilities.shape[-1] - num_classes
            for there in _around(self._start, grid.box_size):
                probabilities[there] = background

    def add(self, start: Sequence[int], logits: np.ndarray) -> None:
        """Restores the voxels of the scan that a block suffices for.

        Args:
          start: first voxel of the block on the model's grid.
          logits: [*block, K].
        """
        low, weights, first, box = [], [], [], []
        for axis, begin, size in zip(self._axes, start, logits.shape, strict=False):
            fine = axis.between(begin, begin + size)
            low.append(axis.low[fine] - begin)
            weights.append(axis.weight[fine])
            first.append(fine.start)
            box.append(fine.stop - fine.start)
        if 0 in box:
            return
        there = tuple(
            slice(s + f, s + f + n) for s, f, n in zip(self._start, first, box, strict=True)
        )
        steps = [bool(weight.any()) for weight in weights]
        if self.probabilities is None:
            self.labels[there] = _labels(logits, low, weights, steps, self.labels.dtype)
        else:
            everywhere = np.ones(box, bool)
            labels = np.empty(box, self.labels.dtype)
            values = self.probabilities[there]

            def fill(voxels, found):
                labels[voxels] = found.argmax(-1)
                shifted = np.exp(found - found.max(-1, keepdims=True))
                shares = shifted / shifted.sum(-1, keepdims=True)
                values[voxels] = shares[..., -values.shape[-1] :]

            _interpolate(logits, low, weights, steps, everywhere, fill)
            self.labels[there] = labels


def _around(start: Sequence[int], size: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yields slabs that together are all outside of a box, and do not overlap."""
    inside: tuple[slice, ...] = ()
    for first, length in zip(start, size, strict=True):
        yield (*inside, slice(0, first))
        yield (*inside, slice(first + length, None))
        inside = (*inside, slice(first, first + length))


class _Axis:
    """Where the voxels of a finer or coarser axis lie between those of the model's axis."""

    def __init__(self, fine: int, coarse: int):
        # Both grids have the same outer faces; beyond the outermost centers values are constant.
        place = (np.arange(fine) + 0.5) * (coarse / fine) - 0.5
        place = np.clip(place, 0, coarse - 1) if fine != coarse else np.arange(fine, dtype=float)
        self.low = np.minimum(np.floor(place).astype(int), max(coarse - 2, 0))
        if fine == coarse:
            self.low = np.arange(fine)
        self.weight = (place - self.low).astype(np.float32)
        self._coarse = coarse
        self._exact = fine == coarse

    def between(self, begin: int, end: int) -> slice:
        """Returns the fine voxels whose both neighbors lie in [begin, end) of the model's axis.

        Blocks share one voxel, and the fine voxels below it belong to the earlier block.
        """
        last = end if end == self._coarse else end - 1
        return slice(*(int(i) for i in np.searchsorted(self.low, (begin, last))))


def _labels(logits, low, weights, steps, dtype):
    """Finds the largest of the interpolated logits of each fine voxel."""
    largest = logits.argmax(-1).astype(dtype)
    # True where the logits around a fine voxel do not all have the same largest class.
    differs = np.zeros(largest.shape, bool)
    for axis, step in enumerate(steps):
        if not step:
            continue
        differs = _either_neighbor(differs, axis)
        differs |= _changes(largest, axis)
    # `differs` knows changes along an axis at one corner of a cell; the loop carries them over.
    labels = largest[np.ix_(*low)]
    border = differs[np.ix_(*low)]
    if border.any():

        def fill(voxels, found):
            labels[voxels] = found.argmax(-1)

        _interpolate(logits, low, weights, steps, border, fill)
    return labels


def _either_neighbor(marks, axis):
    """Marks voxels that are marked or whose next neighbor along an axis is."""
    result = marks.copy()
    source = [slice(None)] * marks.ndim
    target = list(source)
    source[axis], target[axis] = slice(1, None), slice(None, -1)
    result[tuple(target)] |= marks[tuple(source)]
    return result


def _changes(largest, axis):
    """Marks voxels whose next neighbor along an axis has another class."""
    result = np.zeros(largest.shape, bool)
    upper = [slice(None)] * largest.ndim
    lower = list(upper)
    upper[axis], lower[axis] = slice(1, None), slice(None, -1)
    result[tuple(lower)] = largest[tuple(upper)] != largest[tuple(lower)]
    return result


def _interpolate(
    logits: np.ndarray,
    low: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    steps: Sequence[bool],
    chosen: np.ndarray,
    use: Callable[[tuple[np.ndarray, ...], np.ndarray], None],
) -> None:
    """Interpolates the logits of chosen fine voxels and hands them on, a chunk at a time."""
    classes = logits.shape[-1]
    flat = logits.reshape(-1, classes)
    strides = np.cumprod([1, *logits.shape[-2:0:-1]])[::-1]
    for index in np.array_split(
        np.flatnonzero(chosen), 1 + np.count_nonzero(chosen) * classes // CHUNK_NUMBERS
    ):
        voxels = np.unravel_index(index, chosen.shape)
        base = sum(lo[v] * stride for lo, v, stride in zip(low, voxels, strides, strict=True))
        total = np.zeros((len(index), classes), np.float32)
        for corner in itertools.product(*((0, 1) if step else (0,) for step in steps)):
            place, share = base, np.ones(len(index), np.float32)
            for side, weight, voxel, stride, step in zip(
                corner, weights, voxels, strides, steps, strict=True
            ):
                place = place + side * stride
                if step:
                    share = share * (weight[voxel] if side else 1 - weight[voxel])
            total += flat[place] * share[:, None]
        use(voxels, total)
