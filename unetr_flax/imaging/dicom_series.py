"""Series of DICOM slices, sorted by where they lie; gaps, doubles and tilts are told."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unetr_flax.imaging.dicom_slice import (
    SeriesFile,
    Slice,
    is_dicom,
    read_pixels,
    read_series_file,
    read_slice,
)
from unetr_flax.imaging.file_grid import FileGrid, check_affine, plane_slabs
from unetr_flax.imaging.image_file import ras_affine
from unetr_flax.imaging.regular_file import reason
from unetr_flax.imaging.volume import VolumeError

# Gaps between slices may differ by this share, as positions are rounded.
_GAP_TOLERANCE = 0.1
# In voxels: how far a slice may lie beside the line through the first and the last.
_SHIFT_TOLERANCE = 0.1
_LARGEST_TILT = 0.5  # In degrees.


@dataclasses.dataclass(frozen=True, eq=False)
class DicomSeries:
    """A volume of DICOM slices.

    Attributes:
      path: the folder.
      slices: in the order of the third axis of the grid.
      grid: the voxel grid: along the rows, along the columns, from slice to slice.
      channels: always 1.
    """

    path: Path
    slices: tuple[Slice, ...]
    grid: FileGrid
    channels: int = 1

    @classmethod
    def open_folder(cls, folder: Path) -> "DicomSeries":
        """Reads the headers of the only series in a folder.

        Raises:
          VolumeError: as for `open`, and if there is no series.
        """
        try:
            files = sorted(folder / name for name in os.listdir(folder) if name[0] != ".")
        except OSError as error:
            raise VolumeError(f"{folder}: cannot be read ({reason(error)})") from None
        paths = [path for path in files if path.is_file() and is_dicom(path)]
        if not paths:
            raise VolumeError(f"{folder}: a folder without DICOM slices")
        return cls.open(paths)

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "DicomSeries":
        """Reads and checks the headers of the slices of a series, given in any order.

        Single images beside them are passed over, see `group_by_series`.

        Raises:
          VolumeError: if a file cannot be read, or holds several slices or colors; if the files
            belong to several series; if slices are missing, doubled, shifted, or differ in size,
            spacing or orientation; if the gantry was tilted; if SimpleITK is not installed.
        """
        folder = paths[0].parent
        found = group_by_series(paths)
        if len(found) != 1:
            sizes = ", ".join(str(len(files)) for files in found)
            raise VolumeError(
                f"{folder}: {len(found)} DICOM series (of {sizes} slices), must be one"
            )
        slices = [read_slice(file.path) for file in found[0]]
        _check_alike(folder, slices)
        rows, columns = np.reshape(slices[0].orientation, (2, 3))
        normal = np.cross(rows, columns)
        slices = sorted(slices, key=lambda one: float(normal @ one.position))
        positions = np.array([one.position for one in slices])
        _check_gaps(folder, slices, positions @ normal)
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        _check_line(folder, slices, positions, step, normal)
        # The first axis runs along a row, from column to column.
        steps = np.column_stack([rows * slices[0].spacing[0], columns * slices[0].spacing[1], step])
        affine = ras_affine(steps, slices[0].position)
        check_affine(folder, affine)
        grid = FileGrid.from_affine((*slices[0].size, len(slices)), affine)
        return cls(folder, tuple(slices), grid)

    def fill(self, image: np.ndarray) -> None:
        """Reads the slices, rescaled, into an array [X, Y, Z, 1] of the canonical grid.

        Raises:
          VolumeError: if a slice cannot be read.
        """
        view = self.grid.view_on_file_axes(image)
        # Neighbors along the third axis may be neighbors in memory, which single slices would visit
        # one at a time.
        for planes in plane_slabs(self.grid.shape, 4):
            view[:, :, planes, 0] = np.stack([read_pixels(one) for one in self.slices[planes]]).T


def group_by_series(paths: Sequence[Path]) -> list[list[SeriesFile]]:
    """Groups DICOM files by the UID of their series, in the order of the series' numbers.

    Beside series of several files those of a single one are left out: pictures that show where the
    slices of another series lie, and reports that were saved as a picture.

    Raises:
      VolumeError: if a file cannot be read or names no series; if SimpleITK is not installed.
    """
    found: dict[str, list[SeriesFile]] = {}
    for file in sorted(map(read_series_file, paths), key=lambda file: (file.number, file.series)):
        found.setdefault(file.series, []).append(file)
    groups = list(found.values())
    return [group for group in groups if len(group) > 1] or groups


def _check_alike(folder: Path, slices: list[Slice]) -> None:
    """Raises if there are not two slices, or if they differ in more than position."""
    if len(slices) < 2:
        raise VolumeError(f"{folder}: a DICOM series of one slice, must be two or more")
    first = slices[0]
    axes = np.reshape(first.orientation, (2, 3))
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-3):
        raise VolumeError(
            f"{first.path}: image orientation {first.orientation}, must be two directions at right "
            "angles"
        )
    for name in ("size", "spacing", "orientation"):
        value = getattr(first, name)
        other = [one for one in slices if not np.allclose(getattr(one, name), value, atol=1e-3)]
        if other:
            raise VolumeError(
                f"{folder}: {name} of {len(other)} of {len(slices)} slices is not that of the "
                f"others: {getattr(other[0], name)} in {other[0].path.name}, {value} in "
                f"{first.path.name}"
            )


def _check_gaps(folder: Path, slices: list[Slice], places: np.ndarray) -> None:
    """Raises if slices are doubled or missing; `places` are their distances along the normal."""
    gaps = np.diff(places)
    apart = gaps[gaps > 1e-3]
    usual = float(np.median(apart)) if apart.size else 0.0
    doubled = np.flatnonzero(gaps <= _GAP_TOLERANCE * usual)
    if doubled.size:
        one, other = slices[doubled[0]], slices[doubled[0] + 1]
        raise VolumeError(
            f"{folder}: {doubled.size} of {len(slices)} slices are doubled, the first at "
            f"{places[doubled[0]]:.6g} mm ({one.path.name} and {other.path.name})"
        )
    uneven = np.flatnonzero(np.abs(gaps - usual) > _GAP_TOLERANCE * usual)
    if uneven.size:
        i = int(uneven[0])
        raise VolumeError(
            f"{folder}: slices are missing or uneven, {gaps[i]:.6g} mm between {places[i]:.6g} and "
            f"{places[i + 1]:.6g} mm ({slices[i].path.name} and {slices[i + 1].path.name}); "
            f"{uneven.size} of {gaps.size} gaps are not {usual:.6g} mm"
        )


def _check_line(
    folder: Path, slices: list[Slice], positions: np.ndarray, step: np.ndarray, normal: np.ndarray
) -> None:
    """Raises if slices do not lie above each other, as if cut from one block at right angles."""
    tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1)))
    if tilt > _LARGEST_TILT:
        raise VolumeError(
            f"{folder}: slices are shifted by a gantry tilt of {tilt:.3g} degrees, must be at most "
            f"{_LARGEST_TILT}; resample them to a straight volume first"
        )
    off = positions - positions[0] - np.arange(len(slices))[:, None] * step
    # Along the normal the gaps have been checked.
    off = np.linalg.norm(off - np.outer(off @ normal, normal), axis=1)
    worst = int(off.argmax())
    if off[worst] > _SHIFT_TOLERANCE * min(slices[0].spacing):
        raise VolumeError(
            f"{folder}: {slices[worst].path.name} is shifted by {off[worst]:.3g} mm against the "
            "other slices"
        )
