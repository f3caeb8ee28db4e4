"""Series of DICOM slices, sorted by where they lie; gaps, doubles and tilts are told."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unetr_flax.imaging.extras import import_simpleitk
from unetr_flax.imaging.file_grid import FileGrid, check_affine
from unetr_flax.imaging.itk_file import call, pixel_size, ras_affine
from unetr_flax.imaging.nifti_file import LARGEST_DEFLATE_RATIO
from unetr_flax.imaging.regular_file import open_regular_file, reason
from unetr_flax.imaging.volume import VolumeError

# Kinds of DICOM objects that lie beside slices and are no images, as starts of SOP class UIDs: the
# index of a medium, presentation states, raw data, segmentations, reports, encapsulated documents,
# radiotherapy structures and plans.
_NO_IMAGES = (
    "1.2.840.10008.1.3.10",
    "1.2.840.10008.5.1.4.1.1.11.",
    "1.2.840.10008.5.1.4.1.1.66",
    "1.2.840.10008.5.1.4.1.1.88.",
    "1.2.840.10008.5.1.4.1.1.104.",
    "1.2.840.10008.5.1.4.1.1.481.3",
    "1.2.840.10008.5.1.4.1.1.481.5",
)

# Gaps between slices may differ by this share, as positions are rounded.
_GAP_TOLERANCE = 0.1
# In voxels: how far a slice may lie beside the line through the first and the last.
_SHIFT_TOLERANCE = 0.1
_LARGEST_TILT = 0.5  # In degrees.


@dataclasses.dataclass(frozen=True)
class Slice:
    """The header of a DICOM file with one slice.

    Attributes:
      path: the file.
      series: UID of its series.
      number: number of its series within the study, 0 if unknown.
      size: pixels along the rows and along the columns.
      spacing: mm between pixels along the rows and along the columns.
      orientation: directions of the rows and of the columns, six numbers, left-posterior-superior.
      position: center of the first pixel in mm, left-posterior-superior.
    """

    path: Path
    series: str
    number: int
    size: tuple[int, int]
    spacing: tuple[float, ...]
    orientation: tuple[float, ...]
    position: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class DicomSeries:
    """A volume of DICOM slices.

    Attributes:
      path: the folder.
      files: the slices, in the order of the third axis of the grid.
      grid: the voxel grid: along the rows, along the columns, from slice to slice.
      channels: always 1.
    """

    path: Path
    files: tuple[Path, ...]
    grid: FileGrid
    channels: int = 1

    @classmethod
    def open_folder(cls, folder: Path) -> "DicomSeries":
        """Reads the headers of the only series in a folder.

        Raises:
          VolumeError: as for `open`, and if there is no series or more than one.
        """
        try:
            files = sorted(folder / name for name in os.listdir(folder) if name[0] != ".")
        except OSError as error:
            raise VolumeError(f"{folder}: cannot be read ({reason(error)})") from None
        found = group_by_series([path for path in files if path.is_file() and is_dicom(path)])
        if not found:
            raise VolumeError(f"{folder}: a folder without DICOM slices")
        if len(found) > 1:
            sizes = ", ".join(str(len(slices)) for slices in found.values())
            raise VolumeError(
                f"{folder}: {len(found)} DICOM series (of {sizes} slices), must be one"
            )
        return cls._from_slices(*found.values())

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "DicomSeries":
        """Reads and checks the headers of the slices of a series, given in any order.

        Raises:
          VolumeError: if a file cannot be read, holds several slices or colors, or belongs to
            another series; if slices are missing, doubled, shifted, or differ in size, spacing or
            orientation; if the gantry was tilted; if SimpleITK is not installed.
        """
        found = group_by_series(paths)
        if len(found) != 1:
            raise VolumeError(f"{paths[0]}: {len(paths)} files of {len(found)} DICOM series")
        return cls._from_slices(*found.values())

    @classmethod
    def _from_slices(cls, slices: list[Slice]) -> "DicomSeries":
        folder = slices[0].path.parent
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
        return cls(folder, tuple(one.path for one in slices), grid)

    def fill(self, image: np.ndarray) -> None:
        """Reads the slices, rescaled, into an array [X, Y, Z, 1] of the canonical grid.

        Raises:
          VolumeError: if a slice cannot be read.
        """
        sitk = import_simpleitk()
        view = self.grid.view_on_file_axes(image)
        for i, path in enumerate(self.files):
            read = call(path, _reader(path).Execute)
            stored = sitk.GetArrayViewFromImage(read)
            view[:, :, i, 0] = stored.reshape(self.grid.shape[1::-1]).T


def is_dicom(path: Path) -> bool:
    """Tells whether a file is a DICOM file of an image, by its first bytes.

    Raises:
      VolumeError: if there is no such file, or if it cannot be opened.
    """
    with open_regular_file(path) as file:
        head = file.read(1024)
    return head[128:132] == b"DICM" and not _sop_class(head).startswith(_NO_IMAGES)


def group_by_series(paths: Sequence[Path]) -> dict[str, list[Slice]]:
    """Reads the headers of slices and groups them by the UID of their series, in sorted order.

    Raises:
      VolumeError: if a file cannot be read or is not a single slice; if SimpleITK is missing.
    """
    found: dict[str, list[Slice]] = {}
    for one in sorted(map(_read_slice, paths), key=lambda one: (one.number, one.series)):
        found.setdefault(one.series, []).append(one)
    return found


def _sop_class(head: bytes) -> str:
    """Finds the SOP class UID in the first bytes of a DICOM file; empty if there is none."""
    at = 132
    while head[at : at + 2] == b"\x02\x00":
        element, kind = head[at + 2 : at + 4], head[at + 4 : at + 6]
        is_long = kind in (b"OB", b"OW", b"UN", b"UT", b"SQ")
        start = at + (12 if is_long else 8)
        length = int.from_bytes(head[at + 8 : start] if is_long else head[at + 6 : start], "little")
        if element == b"\x02\x00":
            return head[start : start + length].decode("latin-1").rstrip("\0 ")
        at = start + length
    return ""


def _reader(path: Path) -> Any:
    reader = import_simpleitk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    call(path, lambda: reader.SetFileName(str(path)))
    return reader


def _read_slice(path: Path) -> Slice:
    """Reads and checks the header of one slice."""
    with open_regular_file(path) as file:
        capacity = os.fstat(file.fileno()).st_size * LARGEST_DEFLATE_RATIO
    reader = _reader(path)
    call(path, reader.ReadImageInformation)
    columns, rows, *frames = reader.GetSize()
    if math.prod(frames) != 1:
        raise VolumeError(f"{path}: {math.prod(frames)} frames in one file, must be one slice")
    if not 0 < columns * rows * pixel_size(path, reader) <= capacity:
        raise VolumeError(f"{path}: {columns} x {rows} pixels, more than the file can hold")
    series = _text(reader, "0020|000e")
    if not series:
        raise VolumeError(f"{path}: no UID of a series")
    number = _text(reader, "0020|0011")
    row_spacing, column_spacing = _numbers(path, reader, "0028|0030", "pixel spacing", 2)
    return Slice(
        path=path,
        series=series,
        number=int(number) if number.isdecimal() and len(number) < 10 else 0,
        size=(columns, rows),
        # DICOM has the distance of rows first.
        spacing=(column_spacing, row_spacing),
        orientation=_numbers(path, reader, "0020|0037", "image orientation", 6),
        position=_numbers(path, reader, "0020|0032", "image position", 3),
    )


def _text(reader: Any, tag: str) -> str:
    return reader.GetMetaData(tag).strip("\0 ") if reader.HasMetaDataKey(tag) else ""


def _numbers(path: Path, reader: Any, tag: str, name: str, count: int) -> tuple[float, ...]:
    text = _text(reader, tag)
    try:
        numbers = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise VolumeError(f"{path}: {name} ({tag}) is {text!r}, must be {count} numbers")
    return numbers


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
