"""NIfTI files read onto the canonical grid, and label maps written back onto a file's own grid."""

from pathlib import Path

import numpy as np

from unetr_flax.imaging.file_grid import NIFTI_ENDINGS, check_ending, plane_slabs
from unetr_flax.imaging.image_file import ImageFile
from unetr_flax.imaging.nifti_file import open_nifti
from unetr_flax.imaging.scan import allocate, read_scan
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
    path = Path(path)
    check_ending(path, NIFTI_ENDINGS)
    file = open_nifti(path)
    if file.channels != 1:
        raise VolumeError(f"{path}: shape {(*file.grid.shape, file.channels)}, must be 3D")
    labels = allocate(path, file.grid.canonical_shape, np.int32)
    stored = file.read_stored()[..., 0]
    view = file.grid.view_on_file_axes(labels)
    for planes in plane_slabs(file.grid.shape, 8):
        view[:, :, planes] = _whole_numbers(file, stored[:, :, planes], planes.start)
    return labels, file.grid.canonical_affine


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


def _whole_numbers(file: ImageFile, stored: np.ndarray, first_plane: int) -> np.ndarray:
    """Converts some planes of a file to int32, if all are whole numbers."""
    values = file.scale(stored)
    # NaN and numbers beyond int32 become other numbers, which the comparison finds.
    with np.errstate(all="ignore"):
        whole = np.rint(values) if values.dtype.kind == "f" else values
        labels = whole.astype(np.int32)
        wrong = (labels != whole) | ~(np.abs(values - whole) <= _rounding_error(file, stored))
    if wrong.any():
        x, y, z = (int(i) for i in np.argwhere(wrong)[0])
        raise VolumeError(
            f"{file.path}: labels must be whole numbers of 32 bits, voxel "
            f"{(x, y, first_plane + z)} of the file is {values[x, y, z]:.9g}"
        )
    return labels


def _rounding_error(file: ImageFile, stored: np.ndarray) -> np.ndarray | float:
    """Bounds how far scaled numbers may be from those that were to be stored."""
    if (file.slope, file.intercept) == (1, 0):
        return 0.0
    # Slope and intercept are themselves rounded to float32 in a header.
    header = np.finfo(np.float32).eps * (
        np.abs(stored.astype(np.float64) * file.slope) + abs(file.intercept)
    )
    # From a slope of 1 on not every whole number can be stored, so none was rounded.
    half_step = abs(file.slope) / 2 if stored.dtype.kind in "iu" and abs(file.slope) < 1 else 0.0
    return half_step + header
