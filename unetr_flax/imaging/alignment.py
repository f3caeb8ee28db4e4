"""Files on one grid: the axes of one matched with those of the other, however they lie on disk."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from unetr_flax.imaging.file_grid import FileGrid
from unetr_flax.imaging.volume import VolumeError

# In voxels: how far a corner of a grid may be from that of another one that is taken for the same.
# The affines of one grid differ by rounding if different programs wrote them.
GRID_TOLERANCE = 0.1


def align(grid: FileGrid, image_grid: FileGrid) -> tuple[FileGrid, float]:
    """Places the grid of a file on that of an image.

    The orientation is decided once, for the image: the axes of the file are matched with the
    image's and not with the patient's, so rounding of an oblique affine cannot turn one of the two.

    Args:
      grid: the grid of the file, such as a label map or another channel.
      image_grid: the grid of the image's file.

    Returns:
      The grid of the file in units of the image's canonical voxels, and by how many of these voxels
      a corner of the file's grid is off at most, infinite where the shapes differ.
    """
    relative = np.linalg.solve(image_grid.canonical_affine, grid.affine)
    aligned = dataclasses.replace(grid, affine=relative)
    if aligned.canonical_shape != image_grid.canonical_shape:
        return aligned, float("inf")
    return aligned, float(np.abs(_shifts(aligned)).max())


def check_aligned(
    path: Path, grid: FileGrid, image: Path, image_grid: FileGrid, what: str
) -> FileGrid:
    """Places the grid of a file on that of an image, which must be the same one.

    Args:
      path: the file.
      grid: as for `align`.
      image: the file of the image.
      image_grid: as for `align`.
      what: what the two files are, such as "the channels of a scan".

    Returns:
      The grid of the file as `align` returns it.

    Raises:
      VolumeError: if the numbers of voxels differ, or if a corner of the grid is more than a tenth
        of a voxel away.
    """
    aligned, voxels = align(grid, image_grid)
    shape, shape_of_image = aligned.canonical_shape, image_grid.canonical_shape
    if shape != shape_of_image:
        raise VolumeError(
            f"{path}: grid of {shape} voxels, {image} has {shape_of_image}; {what} must be on one "
            "grid"
        )
    if not voxels <= GRID_TOLERANCE:
        shifts = image_grid.canonical_affine[:3, :3] @ _shifts(aligned)
        mm = float(np.linalg.norm(shifts, axis=0).max())
        raise VolumeError(
            f"{path}: its grid is off by {voxels:.3g} voxels ({mm:.3g} mm) at a corner from "
            f"{image}; {what} must agree within {GRID_TOLERANCE} voxels"
        )
    return aligned


def _shifts(aligned: FileGrid) -> np.ndarray:
    """Returns by how many voxels each of the 8 corners of an aligned grid is off, [3, 8]."""
    faces = [(-0.5, length - 0.5) for length in aligned.canonical_shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*faces)]).T
    return ((aligned.canonical_affine - np.eye(4)) @ corners)[:3]
