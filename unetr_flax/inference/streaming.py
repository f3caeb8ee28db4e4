"""Logits of large volumes, block by block, so that they are never in memory as a whole."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from unetr_flax.imaging.intensity import background
from unetr_flax.imaging.padding import centered_start, crop_or_pad
from unetr_flax.inference import windows
from unetr_flax.inference.accumulators import Accumulator, Place, fits_on, make_accumulator

# Bytes on the host for sums of windows; larger volumes are computed in several tiles.
MAX_SUM_BYTES = 3 * 2**29
# Blocks are handed on in pieces of about as many bytes.
BLOCK_BYTES = 2**25
SIGMA_SCALE = 0.125

Predict = Callable[[np.ndarray], jax.Array | np.ndarray]
Corner = tuple[int, ...]


def stream_logits(
    image: np.ndarray,
    predict: Predict,
    num_classes: int,
    roi: Sequence[int],
    *,
    overlap: float,
    batch_size: int,
    device: Any,
    max_bytes: int = MAX_SUM_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Computes the logits of `sliding_window_inference` with gaussian weights, in blocks.

    Windows are computed layer by layer along the first axis. Once no further window contains a
    plane, its logits are final: they are handed on, and their memory is used again. So the sums
    take (K + 1) numbers per voxel of one layer of windows, not of the volume. If that is more than
    `max_bytes` on the host, the volume is cut into tiles along another axis, and windows that
    reach into two tiles are computed for each. An axis that is shorter than the window is filled
    up with the lowest intensity of each channel.

    Args:
      image: [X, Y, Z, C].
      predict: maps windows [batch_size, *roi, C] to logits [batch_size, *roi, K].
      num_classes: number of classes K.
      roi: voxels of the window per axis.
      overlap: fraction of the window that neighbors share, in [0, 1).
      batch_size: windows per call of `predict`; the last batch is filled up.
      device: the device that computes; an accelerator adds up by itself if it has the memory.
      max_bytes: bytes of sums on the host.
      progress: called with the number of windows done and of all windows after each batch.

    Yields:
      First voxel of a block on the image's grid, and its logits [*block, K]. The blocks cover the
      image in ascending order, and neighbors overlap by one voxel.
    """
    spatial = image.shape[:-1]
    padded = tuple(max(s, r) for s, r in zip(spatial, roi, strict=True))
    first = centered_start(spatial, padded)
    image = crop_or_pad(image, first, padded, fill=background(image))
    offset = tuple(-f for f in first)
    starts = windows.window_starts(padded, roi, [overlap] * len(roi))
    weights = windows.importance(roi, "gaussian", [SIGMA_SCALE] * len(roi)).astype(np.float32)

    layer = 4 * roi[0] * padded[1] * padded[2] * (num_classes + 1)
    on_device = fits_on(device, layer)
    axis = 1 if padded[1] >= padded[2] else 2
    place: Place = "device" if on_device else "host"
    tiles = [(0, padded[axis])]
    if not on_device and layer > max_bytes:
        tiles = _tiles(padded[axis], int(padded[axis] * max_bytes / layer))
    jobs = [_corners(starts, axis, tile, roi) for tile in tiles]
    count, done = sum(map(len, jobs)), 0

    for (begin, end), corners in zip(tiles, jobs, strict=True):
        low, high = [0, 0, 0], list(padded)
        # Neighboring tiles share one voxel.
        low[axis], high[axis] = begin, min(end + 1, padded[axis])
        layer_sums = _LayerSums(low, high, roi, weights, place)
        # On CPU the next batch would take the cores and the memory that this one's sums need.
        ahead = 0 if device.platform == "cpu" else 1
        for batch, outputs in _predicted(image, predict, roi, batch_size, corners, ahead):
            for x in sorted({corner[0] for corner in batch}):
                yield from _cropped(layer_sums.blocks_before(x), offset, spatial)
                layer_sums.add([c if c[0] == x else None for c in batch], outputs)
            del outputs  # before the next ones are computed
            done += len(batch)
            if progress is not None:
                progress(done, count)
        yield from _cropped(layer_sums.blocks_before(padded[0]), offset, spatial)


class _LayerSums:
    """Sums of the windows of one layer within a box, from which final planes are taken."""

    def __init__(
        self,
        low: Sequence[int],
        high: Sequence[int],
        roi: Sequence[int],
        weights: np.ndarray,
        place: Place,
    ):
        self._low, self._weights = low, weights
        self._place: Place = place
        self._shape = (1, roi[0], high[1] - low[1], high[2] - low[2])
        self._first = 0
        self._sums: Accumulator | None = None
        self._last: np.ndarray | None = None

    def add(self, corners: Sequence[Corner | None], outputs: jax.Array | np.ndarray) -> None:
        """Adds windows of the present layer; None for outputs that are not of it."""
        if self._sums is None:
            self._sums = make_accumulator(self._place, self._shape, self._weights, outputs)
            self._plane_bytes = 4 * math.prod(self._shape[2:]) * outputs.shape[-1]
        _, y, z = self._low
        self._sums.add(
            [None if c is None else (0, 0, c[1] - y, c[2] - z) for c in corners], outputs
        )

    def blocks_before(self, x: int) -> Iterator[tuple[Corner, np.ndarray]]:
        """Takes the planes before one: first voxels and logits of blocks that share a plane."""
        count = x - self._first
        if self._sums is None or count == 0:
            return
        step = max(1, BLOCK_BYTES // self._plane_bytes)
        for start in range(0, count, step):
            planes = self._sums.means(start, min(step, count - start))[0]
            begin = self._first + start
            if self._last is not None:
                planes, begin = np.concatenate([self._last, planes]), begin - 1
            self._last = planes[-1:].copy()
            yield (begin, self._low[1], self._low[2]), planes
        self._sums.advance(count)
        self._first = x


def _predicted(
    image: np.ndarray,
    predict: Predict,
    roi: Sequence[int],
    batch_size: int,
    corners: Sequence[Corner],
    ahead: int,
) -> Iterator[tuple[Sequence[Corner], jax.Array | np.ndarray]]:
    """Computes batches of windows; some are dispatched before the present one is used."""
    pending: list[tuple[Sequence[Corner], jax.Array | np.ndarray]] = []
    for i in range(0, len(corners), batch_size):
        batch = corners[i : i + batch_size]
        # Each batch needs a new array, since the device may still read the previous one.
        inputs = np.zeros((batch_size, *roi, image.shape[-1]), image.dtype)
        for window, start in zip(inputs, batch, strict=False):
            window[...] = crop_or_pad(image, start, roi)
        pending.append((batch, predict(inputs)))
        if len(pending) > ahead:
            yield pending.pop(0)
    yield from pending


def _cropped(
    blocks: Iterator[tuple[Corner, np.ndarray]], offset: Sequence[int], spatial: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Cuts off what was filled up around an image that starts at an offset."""
    for start, logits in blocks:
        corner, crop = [], []
        for first, size, before, length in zip(start, logits.shape, offset, spatial, strict=False):
            low, high = max(first - before, 0), min(first + size - before, length)
            crop.append(slice(low + before - first, max(low, high) + before - first))
            corner.append(low)
        if logits[tuple(crop)].size:
            yield tuple(corner), logits[tuple(crop)]


def _tiles(size: int, limit: int) -> list[tuple[int, int]]:
    """Splits an axis into equal tiles of at most `limit` voxels and one shared with the next."""
    count = math.ceil(size / max(1, limit - 1))
    edges = [size * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _corners(
    starts: Sequence[Sequence[int]], axis: int, tile: tuple[int, int], roi: Sequence[int]
) -> list[Corner]:
    """Lists the windows that reach into a tile or its shared voxel, the first axis slowest."""
    axes = [list(s) for s in starts]
    axes[axis] = [s for s in axes[axis] if s <= tile[1] and s + roi[axis] > tile[0]]
    return list(itertools.product(*axes))
