"""A DICOM file with one slice: its header, checked, and its pixels."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from unetr_flax.imaging.extras import import_simpleitk
from unetr_flax.imaging.regular_file import open_regular_file
from unetr_flax.imaging.volume import VolumeError

# Kinds of DICOM objects that lie beside slices and are none, as starts of SOP class UIDs: the index
# of a medium, presentation states, raw data, segmentations, reports, encapsulated documents, and
# doses, structures and plans of radiotherapy.
_NO_SLICES = (
    "1.2.840.10008.1.3.10",
    "1.2.840.10008.5.1.4.1.1.11.",
    "1.2.840.10008.5.1.4.1.1.66",
    "1.2.840.10008.5.1.4.1.1.88.",
    "1.2.840.10008.5.1.4.1.1.104.",
    "1.2.840.10008.5.1.4.1.1.481.",
)

# Elements of the file meta information (DICOM part 10, section 7.1): the number of the one with the
# SOP class, their value representations, and more bytes than all of them take.
_SOP_CLASS = 2
_META_KINDS = (b"UL", b"OB", b"UI", b"SH", b"AE", b"UR")
_LARGEST_META = 1 << 16

# Names of SimpleITK's pixels that are one real number.
_REAL_PIXELS = (
    "sitkUInt8",
    "sitkInt8",
    "sitkUInt16",
    "sitkInt16",
    "sitkUInt32",
    "sitkInt32",
    "sitkFloat32",
    "sitkFloat64",
)

# Pixels per byte beyond which no compressed file of a slice goes.
_LARGEST_RATIO = 1000


@dataclasses.dataclass(frozen=True)
class SeriesFile:
    """A DICOM file, and the series that it belongs to.

    Attributes:
      path: the file.
      series: UID of its series.
      number: number of its series within the study, 0 if unknown.
    """

    path: Path
    series: str
    number: int


@dataclasses.dataclass(frozen=True)
class Slice:
    """The header of a DICOM file with one slice.

    Attributes:
      path: the file.
      size: pixels along the rows and along the columns.
      spacing: mm between pixels along the rows and along the columns.
      orientation: directions of the rows and of the columns, six numbers, left-posterior-superior.
      position: center of the first pixel in mm, left-posterior-superior.
    """

    path: Path
    size: tuple[int, int]
    spacing: tuple[float, ...]
    orientation: tuple[float, ...]
    position: tuple[float, ...]


def is_dicom(path: Path) -> bool:
    """Tells whether a file is a DICOM file of an image, by its first bytes.

    Raises:
      VolumeError: if there is no such file, or if it cannot be opened.
    """
    head = _head(path)
    # What is damaged counts as a slice, so that reading it tells.
    return head[128:132] == b"DICM" and not _meta(head).get(_SOP_CLASS, "").startswith(_NO_SLICES)


def _head(path: Path) -> bytes:
    with open_regular_file(path) as file:
        return file.read(_LARGEST_META)


def _meta(head: bytes) -> dict[int, str]:
    """Parses the file meta information, texts by element of group 2; empty if it is damaged."""
    found, at = {}, 132
    while head[at : at + 2] == b"\x02\x00":
        element, kind = int.from_bytes(head[at + 2 : at + 4], "little"), head[at + 4 : at + 6]
        if kind not in _META_KINDS:
            return {}
        is_long = kind in (b"OB", b"UR")
        start = at + (12 if is_long else 8)
        length = int.from_bytes(head[at + 8 : start] if is_long else head[at + 6 : start], "little")
        at = start + length
        if at > len(head):
            return {}
        found[element] = head[start:at].decode("latin-1").rstrip("\0 ")
    return found


def _reader(path: Path) -> Any:
    """Makes a reader of a DICOM file.

    The file meta information is checked first: SimpleITK allocates what lengths in it claim,
    while it compares those of all other elements with the size of the file.
    """
    if not _meta(_head(path)):
        raise VolumeError(f"{path}: not a readable DICOM file (damaged file meta information)")
    reader = import_simpleitk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    _call(path, lambda: reader.SetFileName(str(path)))
    return reader


def read_series_file(path: Path) -> SeriesFile:
    """Reads which series a DICOM file belongs to.

    Raises:
      VolumeError: if the file cannot be read or does not say; if SimpleITK is not installed.
    """
    reader = _reader(path)
    _call(path, reader.ReadImageInformation)
    series, number = _text(reader, "0020|000e"), _text(reader, "0020|0011")
    if not series:
        raise VolumeError(f"{path}: no UID of a series (0020|000e)")
    return SeriesFile(path, series, int(number) if re.fullmatch("[0-9]{1,9}", number) else 0)


def read_slice(path: Path) -> Slice:
    """Reads and checks the header of one slice.

    Raises:
      VolumeError: if the file cannot be read, is not one slice, or does not say where it lies; if
        its pixels are not one real number each; if SimpleITK is not installed.
    """
    reader = _reader(path)
    _call(path, reader.ReadImageInformation)
    capacity = path.stat().st_size * _LARGEST_RATIO
    columns, rows, *frames = reader.GetSize()
    if math.prod(frames) != 1:
        raise VolumeError(f"{path}: {math.prod(frames)} frames in one file, must be one slice")
    _check_pixels(path, reader)
    if not 0 < columns * rows <= capacity:
        raise VolumeError(f"{path}: {columns} x {rows} pixels, more than the file can hold")
    row_spacing, column_spacing = _numbers(path, reader, "0028|0030", "pixel spacing", 2)
    return Slice(
        path=path,
        size=(columns, rows),
        # DICOM has the distance of rows first.
        spacing=(column_spacing, row_spacing),
        orientation=_numbers(path, reader, "0020|0037", "image orientation", 6),
        position=_numbers(path, reader, "0020|0032", "image position", 3),
    )


def read_pixels(one: Slice) -> np.ndarray:
    """Reads the rescaled pixels of a slice, [rows, columns].

    Raises:
      VolumeError: if the file cannot be read.
    """
    read = _call(one.path, _reader(one.path).Execute)
    return import_simpleitk().GetArrayFromImage(read).reshape(one.size[::-1])


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


def _call(path: Path, function: Callable[[], Any]) -> Any:
    """Calls a function of SimpleITK; an error of it becomes one line."""
    try:
        return function()
    except MemoryError:
        raise VolumeError(f"{path}: its pixels are more than memory holds") from None
    except Exception as error:
        # The cause comes after places in the source, and may name addresses of objects.
        text = re.sub(r"\w+\(0x[0-9a-f]+\): ", "", " ".join(str(error).split()))
        cause = text.rsplit("ERROR: ", 1)[-1]
        raise VolumeError(f"{path}: not a readable DICOM file ({cause})") from None


def _check_pixels(path: Path, reader: Any) -> None:
    """Raises if pixels are not one real number each."""
    sitk = import_simpleitk()
    if reader.GetPixelID() not in (getattr(sitk, name) for name in _REAL_PIXELS):
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        raise VolumeError(f"{path}: pixels are {kind}, must be one real number each")
