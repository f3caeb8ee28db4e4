"""Random crops, rotated and zoomed at times, which the loader cuts out of samples.

A crop is a function `(sample, rng) -> sample`. All that is random about it is drawn from
`rng`, so a crop can be repeated from the seed of its generator. Intensities and flips are a matter
of the device, see `train.data.augment`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from train.data.preprocess import Sample
from unetr_flax.imaging.padding import crop_or_pad

Crop = Callable[[Sample, np.random.Generator], Sample]


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Cuts out a crop at a random place.

    Where the crop reaches out of the volume, the image has its channel's lowest value and the
    label is 0.

    Attributes:
      roi_size: voxels of the crop per axis.
      foreground_fraction: probability that the crop is centered on a voxel of the foreground, as
        far as it then stays within the volume.
    """

    roi_size: tuple[int, ...]
    foreground_fraction: float = 0.5

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Returns the crop: image [*roi_size, C], label [*roi_size]."""
        center = _random_center(sample, self.roi_size, self.foreground_fraction, rng)
        image, label = _cut(sample, self.roi_size, center)
        return dataclasses.replace(sample, image=image, label=label)


@dataclasses.dataclass(frozen=True)
class RandomRotatedCrop:
    """Cuts out a crop at a random place, at times rotated and zoomed about its center.

    The crop, the rotation and the zoom are one resampling, of the crop's voxels only. There is no
    mirroring: left and right are different anatomy.

    Attributes:
      roi_size: voxels of the crop per axis.
      foreground_fraction: as in `RandomCrop`.
      probability: probability of rotation and zoom.
      max_rotation: largest angle about each axis, in degrees.
      max_zoom: largest relative change of size, by one factor for all axes.
    """

    roi_size: tuple[int, ...]
    foreground_fraction: float = 0.5
    probability: float = 0.5
    max_rotation: float = 15.0
    max_zoom: float = 0.15

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Returns the crop: image [*roi_size, C], label [*roi_size]."""
        center = _random_center(sample, self.roi_size, self.foreground_fraction, rng)
        if rng.random() < self.probability:
            matrix = _random_matrix(self.max_rotation, self.max_zoom, rng)
            image, label = _warp(sample, self.roi_size, center, matrix)
        else:
            image, label = _cut(sample, self.roi_size, center)
        return dataclasses.replace(sample, image=image, label=label)


def default_crop(roi_size: Sequence[int]) -> Crop:
    """Makes a crop that is at times rotated and zoomed."""
    return RandomRotatedCrop(tuple(roi_size))


def strong_crop(roi_size: Sequence[int]) -> Crop:
    """Makes what `default_crop` makes, more often and stronger, for longer trainings."""
    return RandomRotatedCrop(tuple(roi_size), probability=0.8, max_rotation=20.0, max_zoom=0.2)


def plain_crop(roi_size: Sequence[int]) -> Crop:
    """Makes a crop that is neither rotated nor zoomed."""
    return RandomCrop(tuple(roi_size))


def nnunet_crop(roi_size: Sequence[int]) -> Crop:
    """Makes a crop that is rotated and zoomed about as much as nnU-Net's.

    nnU-Net (Isensee et al. 2021, supplementary note 2) rotates by up to 30 degrees and zooms by 0.7
    to 1.4, each with probability 0.2; here both happen together, as often as either does there.
    """
    return RandomRotatedCrop(tuple(roi_size), probability=0.36, max_rotation=30.0, max_zoom=0.3)


def _random_center(
    sample: Sample, roi_size: Sequence[int], foreground_fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """Draws the center of a crop in voxels; it lies between voxels where the size is even."""
    size, roi = np.array(sample.label.shape), np.array(roi_size)
    middle = (size - 1) / 2
    # The range of centers whose crops lie within the volume; its middle where the crop is larger.
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
    """Cuts out a crop without resampling: its center moves to the nearest whole voxel."""
    start = [
        int(np.floor(middle - (roi - 1) / 2 + 0.5))
        for middle, roi in zip(center, roi_size, strict=True)
    ]
    image = crop_or_pad(sample.image, start, roi_size, fill=sample.background)
    return image, crop_or_pad(sample.label, start, roi_size)


def _warp(
    sample: Sample, roi_size: Sequence[int], center: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Samples a crop along the axes of a matrix: the image linearly, the label to the nearest."""
    # The matrix maps millimeters, the arrays are indexed by voxels.
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


def _random_matrix(max_rotation: float, max_zoom: float, rng: np.random.Generator) -> np.ndarray:
    """Draws a rotation about the three axes in turn, times one zoom: 3 x 3, in millimeters."""
    angles = np.radians(rng.uniform(-max_rotation, max_rotation, 3))
    matrix = np.eye(3) * (1 + rng.uniform(-max_zoom, max_zoom))
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix
