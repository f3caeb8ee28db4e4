"""NIfTI files read onto the canonical grid, and label maps written back onto a file's own grid."""

from pathlib import Path

import numpy as np

from unetr_flax.imaging.file_grid import NIFTI_ENDINGS, check_ending
from unetr_flax.imaging.image_file import ImageFile
from unetr_flax.imaging.label_map import read_whole_numbers
from unetr_flax.imaging.nifti_file import open_nifti
from unetr_flax.imaging.scan import read_scan
from unetr_flax.imaging.volume import Volume, VolumeError


def read_volume(path: Path | str) -> Volume:
    """Reads an image in NIfTI format onto the canonical grid; a fourth axis is its channels.

    Args:
      path: a file that ends in .nii or .nii.gz.

    Raises:
      VolumeError: if the file is missing, damaged or not NIfTI, or claims more voxels than it can
        hold; if its array is not 3D or 4D, is not of real numbers (colors, complex numbers) or not
        finite; if its affine does not place voxels in space; if nibabel is not installed.
    """
    check_ending(Path(path), NIFTI_ENDINGS)
    return read_scan(path).volume


def read_labels(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map in NIfTI format onto the canonical grid.

    Stored numbers that are scaled by a slope below 1 stand for the nearest whole number within
    half a slope, which is how exactly they could be stored.

    Args:
      path: a file that ends in .nii or .nii.gz.

    Returns:
      Class ids [X, Y, Z], int32; and the affine, 4 x 4, voxel indices to millimeters.

    Raises:
      VolumeError: as for `read_volume`, and if voxels are not whole numbers.
    """
    file = open_labels(path)
    if file.channels != 1:
        raise VolumeError(f"{path}: shape {(*file.grid.shape, file.channels)}, must be 3D")
    return read_whole_numbers(file)[..., 0], file.grid.canonical_affine


def open_labels(path: Path | str) -> ImageFile:
    """Reads and checks the header of a label map, or of masks, in NIfTI format.

    Raises:
      VolumeError: as for `read_volume`, but for what is wrong with the voxels.
    """
    check_ending(Path(path), NIFTI_ENDINGS)
    return open_nifti(Path(path))


def write_labels(path: Path | str, labels: np.ndarray, like: Path | str) -> None:
    """Writes a label map of the canonical grid onto the grid of another file.

    The inverse of `read_labels`: the written file has the axes, affine, qform, sform and units of
    `like`, and unsigned integers of 8 bits, or of 16 where a class id needs them.

    Args:
      path: the file to write; must end in .nii or .nii.gz.
      labels: class ids [X, Y, Z] on the canonical grid.
      like: the NIfTI file on whose grid they are written.

    Raises:
      VolumeError: if `like` cannot be read or its grid has another shape, if a label is negative
        or above 65535, or if `path` does not end in .nii or .nii.gz.
      OSError: if `path` cannot be written.
    """
    for name in (like, path):
        check_ending(Path(name), NIFTI_ENDINGS)
    grid = open_nifti(Path(like)).grid
    if labels.shape != grid.canonical_shape:
        raise VolumeError(f"{like}: grid {grid.canonical_shape}, labels have {labels.shape}")
    grid.write_labels(path, labels)
