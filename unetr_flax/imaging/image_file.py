"""A file of any format that is a header and stored voxels, with its header read and checked."""

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from unetr_flax.imaging.file_grid import FileGrid, plane_slabs
from unetr_flax.imaging.stored_voxels import StoredVoxels
from unetr_flax.imaging.volume import VolumeError


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFile:
    """A file whose header has been read and checked.

    Attributes:
      path: the file.
      grid: its voxel grid.
      channels: numbers per voxel of the grid.
      voxels: where the numbers are stored.
      channel_axis: axis of the stored array that holds the channels; None without such an axis.
      slope: stored numbers are multiplied by this.
      intercept: and this is added.
    """

    path: Path
    grid: FileGrid
    channels: int
    voxels: StoredVoxels
    channel_axis: int | None
    slope: float = 1.0
    intercept: float = 0.0

    def fill(self, image: np.ndarray) -> None:
        """Reads the scaled voxels into an array [X, Y, Z, channels] of the canonical grid.

        Raises:
          VolumeError: if the file ends early or is damaged.
        """
        stored = self.read_stored()
        view = self.grid.view_on_file_axes(image)
        for channel in range(self.channels):
            for planes in plane_slabs(self.grid.shape, 8):
                view[:, :, planes, channel] = self.scale(stored[:, :, planes, channel])

    def read_stored(self) -> np.ndarray:
        """Reads the voxels as they are stored, along the file's axes: [*grid.shape, channels].

        Raises:
          VolumeError: as for `fill`.
        """
        stored = self.voxels.read()
        if self.channel_axis is None:
            return stored.reshape((*self.grid.shape, 1), order="F")
        return np.moveaxis(stored, self.channel_axis, -1)

    def scale(self, stored: np.ndarray) -> np.ndarray:
        """Applies the slope and the intercept to stored numbers, in float64 if there are any."""
        if (self.slope, self.intercept) == (1, 0):
            return stored
        # Overflows become infinite, which readers of intensities and labels report.
        with np.errstate(all="ignore"):
            return stored * np.float64(self.slope) + np.float64(self.intercept)


def check_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises VolumeError if an array is not 3D or 4D, is empty, or is not of real numbers."""
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise VolumeError(f"{path}: shape {shape}, must be 3D, or 4D with channels last")
    if dtype.kind not in "iuf":
        names = f"colors ({', '.join(dtype.names)})" if dtype.names else str(dtype)
        raise VolumeError(f"{path}: voxels are {names}, must be real numbers")


def ras_affine(columns: np.ndarray, origin: ArrayLike) -> np.ndarray:
    """Makes an affine to right, anterior and superior from one to left, posterior and superior.

    Args:
      columns: 3 x 3, the steps in mm from voxel to voxel along each axis, as columns.
      origin: center of the first voxel, in mm.
    """
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns, origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
