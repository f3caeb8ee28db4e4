"""A scan and its labels as small NIfTI files in text, for a page."""

import base64
import dataclasses
import gzip
import math
from collections.abc import Sequence

import numpy as np

from unetr_flax.imaging.extras import import_nibabel
from unetr_flax.imaging.resampling import resample_linear, resample_nearest, resampled_shape

# Levels of gray between the lowest and the highest intensity of the first window.
LEVELS = 1000
INT16 = np.iinfo(np.int16)
COMPRESSION = 6
# Slices that tell how well a scan compresses.
PROBE_SLICES = 8


@dataclasses.dataclass(frozen=True)
class PageData:
    """A scan and its labels, for a page.

    Attributes:
      image: NIfTI file of the intensities, gzip, in base64.
      labels: the same of the labels.
      shape: voxels of both along X, Y and Z.
      spacing: mm per voxel.
    """

    image: str
    labels: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]


def encode(
    channel: np.ndarray,
    labels: np.ndarray,
    affine: np.ndarray,
    *,
    step: float,
    max_bytes: int,
) -> PageData:
    """Encodes a scan and its labels, on a coarser grid if they would be too large.

    Args:
      channel: intensities [X, Y, Z], kept as whole multiples of `step`, 16 bits.
      labels: classes [X, Y, Z] from 0 to 65535.
      affine: 4 x 4, voxel indices to mm.
      step: difference of two neighboring levels of gray.
      max_bytes: largest length of both texts together.

    Raises:
      ValueError: if even a grid of a few voxels does not fit.
      VolumeError: if nibabel or scipy is not installed.
    """
    spacing = _spacing(affine)
    shape = channel.shape
    room = _estimated_voxels(channel, step, max_bytes)
    while True:
        shape = _shape_within(channel.shape, spacing, min(room, math.prod(shape)))
        data = _encode_at(shape, channel, labels, affine, step)
        size = len(data.image) + len(data.labels)
        if size <= max_bytes:
            return data
        if max(shape) == 1:
            raise ValueError(f"max_bytes={max_bytes}: too small for a page")
        # Noise compresses less well on a coarser grid, so that the next try may be too large too.
        room = int(math.prod(shape) * min(0.9, 0.95 * max_bytes / size))


def gray_step(channel: np.ndarray, window: tuple[float, float], *, calibrated: bool) -> float:
    """Chooses the difference of neighboring levels of gray.

    Args:
      channel: intensities [X, Y, Z].
      window: those that are shown from black to white.
      calibrated: whether they are in Hounsfield units.

    Returns:
      1 for Hounsfield units and for whole numbers of 16 bits, else a fraction of the window.
    """
    if calibrated:
        return 1.0
    fits = INT16.min <= channel.min() and channel.max() <= INT16.max
    if fits and all(np.array_equal(slab, np.rint(slab)) for slab in channel):
        return 1.0
    return (window[1] - window[0]) / LEVELS


def _encode_at(
    shape: tuple[int, ...],
    channel: np.ndarray,
    labels: np.ndarray,
    affine: np.ndarray,
    step: float,
) -> PageData:
    """Encodes on a grid of another shape over the same extent."""
    factors = np.array(channel.shape) / shape
    # Voxel 0 of the new grid begins at the same face; its center is elsewhere if it is larger.
    to_old = np.diag([*factors, 1.0])
    to_old[:3, 3] = (factors - 1) / 2
    affine = affine @ to_old
    image = _quantize(resample_linear(channel[..., None], shape)[..., 0], step)
    classes = resample_nearest(labels, shape)
    classes = classes.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16)
    return PageData(
        _to_base64(image, affine, slope=step),
        # Viewers draw outlines of what is marked as labels.
        _to_base64(classes, affine, intent="label"),
        tuple(shape),
        _spacing(affine),
    )


def _spacing(affine: np.ndarray) -> tuple[float, ...]:
    return tuple(float(mm) for mm in np.linalg.norm(affine[:3, :3], axis=0))


def _quantize(image: np.ndarray, step: float) -> np.ndarray:
    """Rounds to multiples of a step, int16; beyond its range to its ends."""
    return np.clip(np.rint(image / step), INT16.min, INT16.max).astype(np.int16)


def _to_base64(
    array: np.ndarray, affine: np.ndarray, *, slope: float = 1.0, intent: str = "none"
) -> str:
    image = import_nibabel().Nifti1Image(array, affine)
    image.header.set_slope_inter(slope, 0)
    image.header.set_intent(intent)
    image.header.set_xyzt_units("mm")
    content = gzip.compress(image.to_bytes(), COMPRESSION, mtime=0)
    return base64.b64encode(content).decode("ascii")


def _estimated_voxels(channel: np.ndarray, step: float, max_bytes: int) -> int:
    """Estimates how many voxels fit, by how well the middle of the scan compresses."""
    middle = channel.shape[0] // 2
    probe = channel[max(0, middle - PROBE_SLICES // 2) : middle + PROBE_SLICES // 2 + 1]
    compressed = len(gzip.compress(_quantize(probe, step).tobytes(), COMPRESSION))
    # Base64 makes 4 letters of 3 bytes.
    return max(1, int(max_bytes * 3 / 4 * probe.size / compressed))


def _shape_within(shape: Sequence[int], spacing: Sequence[float], largest: int) -> tuple[int, ...]:
    """Finds the finest grid with at most some number of voxels, coarsening the finest axes first.

    Args:
      shape: voxels per axis.
      spacing: mm per voxel.
      largest: number of voxels.
    """
    if math.prod(shape) <= largest:
        return tuple(shape)

    def coarser(size: float) -> tuple[int, ...]:
        return resampled_shape(shape, spacing, [max(mm, size) for mm in spacing])

    # Bisection of the voxel size that the finer axes are raised to.
    low, high = 0.0, 2 * max(n * mm for n, mm in zip(shape, spacing, strict=True))
    for _ in range(40):
        size = (low + high) / 2
        low, high = (low, size) if math.prod(coarser(size)) <= largest else (size, high)
    return coarser(high)
