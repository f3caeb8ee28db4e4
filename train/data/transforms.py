"""Random crops with small changes of geometry and intensity, determined by one generator."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from train.data.preprocess import Sample
from unetr_flax.imaging.padding import crop_or_pad


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How much a crop is changed. No mirroring: left and right are different anatomy.

    Attributes:
      probability: of a change of geometry.
      max_rotation: degrees about each axis.
      max_zoom: relative change of size, by one factor for all axes.
      intensity: largest relative change of contrast and largest shift, both in units of the
        normalized image.
      noise: largest standard deviation of the noise added.
    """

    probability: float = 0.5
    max_rotation: float = 15.0
    max_zoom: float = 0.15
    intensity: float = 0.1
    noise: float = 0.05


def random_crop(
    sample: Sample,
    roi_size: Sequence[int],
    foreground_fraction: float,
    augmentation: Augmentation | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """One crop of a case: image [*roi_size, C] float32, label [*roi_size] int32.

    Where the crop reaches out of the volume, the image has its channel's minimum and the label 0.

    Args:
      sample: the case.
      roi_size: voxels of the crop per axis.
      foreground_fraction: probability that the crop is centered on a voxel of the foreground,
        as far as it then stays within the volume.
      augmentation: changes to make, or None.
      rng: source of everything random.
    """
    center = _center(sample, roi_size, foreground_fraction, rng)
    if augmentation is not None and rng.random() < augmentation.probability:
        image, label = _warped(sample, roi_size, center, _matrix(augmentation, rng))
    else:
        image, label = _cut(sample, roi_size, center)
    if augmentation is not None:
        contrast, shift = rng.uniform(-augmentation.intensity, augmentation.intensity, 2)
        noise = rng.standard_normal(image.shape, np.float32)
        noise *= np.float32(rng.uniform(0, augmentation.noise))
        image = image * np.float32(1 + contrast) + np.float32(shift) + noise
    return image, label


def _center(
    sample: Sample, roi_size: Sequence[int], foreground_fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """Center of the crop in voxels, between voxels where the crop has an even size."""
    size, roi = np.array(sample.label.shape), np.array(roi_size)
    middle = (size - 1) / 2
    # The centers of crops that lie within the volume; the volume's own where it is the smaller.
    low = np.where(size > roi, (roi - 1) / 2, middle)
    high = np.where(size > roi, size - 1 - (roi - 1) / 2, middle)
    wanted = rng.uniform(low, high)
    if rng.random() < foreground_fraction:
        foreground = sample.foreground
        if foreground.size:
            voxel = foreground[rng.integers(foreground.size)]
            wanted = np.array(np.unravel_index(voxel, sample.label.shape), float)
    return np.clip(wanted, low, high)


def _cut(
    sample: Sample, roi_size: Sequence[int], center: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The crop as it is, moved to the nearest whole voxel."""
    start = [
        int(np.floor(middle - (roi - 1) / 2 + 0.5))
        for middle, roi in zip(center, roi_size, strict=True)
    ]
    image = crop_or_pad(sample.image, start, roi_size, fill=sample.background)
    return image, crop_or_pad(sample.label, start, roi_size)


def _warped(
    sample: Sample, roi_size: Sequence[int], center: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The crop rotated and zoomed about its center: image linearly, label to the nearest."""
    # The rotation is one of millimeters, the arrays are of voxels.
    spacing = np.array(sample.spacing)
    matrix = matrix * spacing[None, :] / spacing[:, None]
    offset = center - matrix @ ((np.array(roi_size) - 1) / 2)
    warp = {"matrix": matrix, "offset": offset, "output_shape": tuple(roi_size), "mode": "constant"}
    channels = [
        ndimage.affine_transform(sample.image[..., i], **warp, order=1, cval=sample.background[i])
        for i in range(sample.image.shape[-1])
    ]
    label = ndimage.affine_transform(sample.label, **warp, order=0, cval=0)
    return np.stack(channels, axis=-1), label


def _matrix(augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """A rotation about the three axes in turn, times one zoom."""
    angles = np.radians(rng.uniform(-augmentation.max_rotation, augmentation.max_rotation, 3))
    matrix = np.eye(3) * (1 + rng.uniform(-augmentation.max_zoom, augmentation.max_zoom))
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix
