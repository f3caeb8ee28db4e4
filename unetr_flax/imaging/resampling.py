"""Arrays resampled to another number of voxels over the same extent."""

from collections.abc import Sequence

import numpy as np

from unetr_flax.imaging.extras import import_ndimage


def resampled_shape(
    shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[int, ...]:
    """Computes how many voxels of another size cover the extent of a grid, at least one per axis.

    Args:
      shape: voxels of the grid per axis.
      spacing: mm per voxel of the grid.
      new_spacing: mm per voxel that are wanted.
    """
    return tuple(
        max(1, round(length * old / new))
        for length, old, new in zip(shape, spacing, new_spacing, strict=True)
    )


def resample_linear(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resamples the channels of an image [X, Y, Z, C] linearly to [*shape, C].

    Raises:
      VolumeError: if scipy is not installed.
    """
    if image.shape[:-1] == tuple(shape):
        return image
    channels = [_zoom(image[..., i], shape, order=1) for i in range(image.shape[-1])]
    return np.stack(channels, axis=-1)


def resample_nearest(labels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resamples a label map [X, Y, Z] to [*shape], each voxel to the nearest of the original.

    Raises:
      VolumeError: if scipy is not installed.
    """
    if labels.shape == tuple(shape):
        return labels
    return _zoom(labels, shape, order=0)


def _zoom(array: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    """Interpolates between voxel centers; both grids have the same outer faces."""
    factors = [new / old for new, old in zip(shape, array.shape, strict=True)]
    return import_ndimage().zoom(array, factors, order=order, mode="nearest", grid_mode=True)
