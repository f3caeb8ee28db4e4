"""Cases read from their files and checked: the image, and the target on the same grid."""

import dataclasses

import numpy as np

from train.data.dataset import BadCasesError, Case, DataError, Dataset
from train.data.targets import encode
from unetr_flax.imaging.alignment import GRID_TOLERANCE, align
from unetr_flax.imaging.file_grid import FileGrid
from unetr_flax.imaging.label_map import read_whole_numbers
from unetr_flax.imaging.scan import open_image_file, read_scan
from unetr_flax.imaging.volume import Volume, VolumeError


def read_case(dataset: Dataset, case: Case) -> tuple[Volume, np.ndarray]:
    """Reads and checks one case.

    Returns:
      The image; and its targets [X, Y, Z], int32, on the same grid, see `train.data.targets`.

    Raises:
      BadCasesError: with all that is wrong, one line per file.
    """
    problems = []
    scan = targets = None
    try:
        scan = read_scan(case.images)
        if scan.volume.array.shape[-1] != len(dataset.modalities):
            problems.append(
                f"{case.images[0]}: {scan.volume.array.shape[-1]} channels, the data set declares "
                f"{len(dataset.modalities)}: {', '.join(dataset.modalities)}"
            )
    except VolumeError as error:
        problems.append(str(error))
    try:
        targets = read_targets(dataset, case, None if scan is None else scan.grid)
    except VolumeError as error:
        problems.append(str(error))
    if problems or scan is None or targets is None:
        raise BadCasesError("\n".join(problems))
    return scan.volume, targets


def read_targets(dataset: Dataset, case: Case, image_grid: FileGrid | None) -> np.ndarray:
    """Reads the targets [X, Y, Z], int32, of a case onto the canonical grid of its image.

    Args:
      dataset: the data set of the case.
      case: the case.
      image_grid: the grid of the image's file; None to check nothing but the numbers.

    Raises:
      VolumeError: if the file cannot be read, is on another grid, or has undeclared numbers.
    """
    file = open_image_file(case.label)
    grid = file.grid
    if image_grid is not None:
        grid, shift = align(file.grid, image_grid)
        if dataset.allow_grid_mismatch and shift > GRID_TOLERANCE:
            # The affine of one of the two says nothing, so voxels are matched as they are stored.
            grid = image_grid
            fits = file.grid.shape == image_grid.shape
        else:
            fits = grid.canonical_shape == image_grid.canonical_shape
        if not fits:
            shapes = (file.grid.shape, image_grid.shape)
            raise VolumeError(f"{case.label}: shape {shapes[0]}, its image has {shapes[1]}")
        if shift > GRID_TOLERANCE and not dataset.allow_grid_mismatch:
            raise VolumeError(
                f"{case.label}: its grid is off by {shift:.3g} voxels at a corner from its image's,"
                f" must be within {GRID_TOLERANCE}; --allow-grid-mismatch takes it voxel by voxel"
            )
    try:
        return encode(dataset, read_whole_numbers(file, grid))
    except VolumeError:
        raise
    except ValueError as error:
        raise VolumeError(f"{case.label}: {error}") from None


def with_masks(dataset: Dataset) -> Dataset:
    """Recognizes label maps that have one channel per label, which are masks that may overlap.

    The first label map decides; the others are checked when they are read.

    Raises:
      DataError: if the channels are not as many as the labels, or too many.
    """
    path = dataset.cases[0].label
    try:
        channels = open_image_file(path).channels
    except VolumeError:
        # Reading the cases lists everything that is wrong.
        return dataset
    if channels == 1:
        return dataset
    if dataset.has_regions or channels != len(dataset.labels) - 1:
        raise DataError(
            f"{path}: {channels} channels; a label map has one, or one mask for each of the "
            f"{len(dataset.labels) - 1} labels: {', '.join(dataset.labels[1:])}"
        )
    return dataclasses.replace(dataset, target="masks")
