"""The sizes of a plan: spacing, median case and crops."""

import math
from collections.abc import Sequence

import numpy as np

from train.data.fingerprint import Fingerprint
from train.options import DataOptions

# nnU-Net's: spacings that differ more are anisotropic.
ANISOTROPY = 3.0


def target_spacing(
    fingerprint: Fingerprint,
) -> tuple[tuple[float, float, float] | None, str]:
    """Chooses the spacing in mm, None if all scans have the same, and says why."""
    spacings = fingerprint.spacings
    median = np.median(spacings, axis=0)
    if np.allclose(spacings, median, rtol=0.01):
        return None, f"all scans have {' x '.join(f'{mm:.3g}' for mm in median)} mm"
    target = median.copy()
    reason = "the median of the scans"
    coarse = int(median.argmax())
    if median[coarse] > ANISOTROPY * np.delete(median, coarse).max():
        # With the median, half of the scans would lose the little detail that they have there.
        target[coarse] = max(
            np.percentile(spacings[:, coarse], 10), np.delete(median, coarse).max()
        )
        reason += f", and the 10th percentile along axis {coarse}, which is coarse"
    x, y, z = (float(f"{mm:.3g}") for mm in target)
    return (x, y, z), reason


def median_shape(fingerprint: Fingerprint, data: DataOptions) -> list[float]:
    """Returns the voxels per axis of the median case, cropped and resampled as the options say."""
    shapes = fingerprint.boxes(data.window) if data.crop_foreground else fingerprint.shapes
    if data.spacing is not None:
        shapes = shapes * fingerprint.spacings / np.array(data.spacing)
    return np.median(shapes, axis=0).tolist()


def crop_size(
    shape: Sequence[float], unit: Sequence[int], largest: int, voxels: float
) -> tuple[int, ...]:
    """Chooses crops that hold a case of a shape, in whole patches, and fit the memory.

    The axis along which crops are largest, as a share of the case, loses a unit until they fit, as
    in nnU-Net; so crops keep the proportions of cases.

    Args:
      shape: voxels of the case per axis.
      unit: voxels per axis of which crops are multiples, one or several patches.
      largest: the most voxels per axis.
      voxels: the most voxels of a crop.
    """
    size = [
        max(step, min(math.ceil(n / step) * step, largest // step * step))
        for n, step in zip(shape, unit, strict=True)
    ]
    while math.prod(size) > voxels:
        shrinkable = [axis for axis in range(3) if size[axis] > unit[axis]]
        if not shrinkable:
            break
        axis = max(shrinkable, key=lambda axis: size[axis] / shape[axis])
        size[axis] -= unit[axis]
    return tuple(size)
