"""Label maps in files: whole numbers."""

from pathlib import Path

import numpy as np

from unetr_flax.imaging.file_grid import FileGrid, plane_slabs
from unetr_flax.imaging.image_file import ImageFile
from unetr_flax.imaging.scan import allocate, open_image_file
from unetr_flax.imaging.volume import VolumeError


def read_whole_numbers(file: ImageFile, grid: FileGrid | None = None) -> np.ndarray:
    """Reads a file of class ids or masks onto the canonical grid.

    Stored numbers that are scaled by a slope below 1 stand for the nearest whole number within
    half a slope, which is how exactly they could be stored.

    Args:
      file: a file whose header has been read.
      grid: the grid whose axes decide the orientation; the file's own if None.

    Returns:
      Whole numbers [X, Y, Z, channels], int32.

    Raises:
      VolumeError: if voxels are not whole numbers, or the file is damaged.
    """
    grid = grid or file.grid
    labels = allocate(file.path, (*grid.canonical_shape, file.channels), np.int32)
    stored = file.read_stored()
    view = grid.view_on_file_axes(labels)
    for channel in range(file.channels):
        for planes in plane_slabs(grid.shape, 8):
            part = stored[:, :, planes, channel]
            view[:, :, planes, channel] = _whole_numbers(file, part, planes.start)
    return labels


def read_label_ids(path: Path) -> set[int]:
    """Finds the ids that a label map holds.

    Raises:
      VolumeError: as for `read_whole_numbers` and `open_image_file`.
    """
    return set(np.unique(read_whole_numbers(open_image_file(path))).tolist())


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
