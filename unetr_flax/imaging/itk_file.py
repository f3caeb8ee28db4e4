"""NRRD and MetaImage files, whose headers are checked before SimpleITK reads the voxels."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unetr_flax.imaging.extras import import_simpleitk
from unetr_flax.imaging.file_grid import FileGrid, check_affine, plane_slabs
from unetr_flax.imaging.nifti_file import LARGEST_DEFLATE_RATIO
from unetr_flax.imaging.regular_file import open_regular_file
from unetr_flax.imaging.volume import VolumeError

ITK_ENDINGS = (".nrrd", ".mha", ".mhd")

# Names of SimpleITK's pixels that are one real number, and their bytes.
_REAL_PIXELS = {
    "sitkUInt8": 1,
    "sitkInt8": 1,
    "sitkUInt16": 2,
    "sitkInt16": 2,
    "sitkUInt32": 4,
    "sitkInt32": 4,
    "sitkUInt64": 8,
    "sitkInt64": 8,
    "sitkFloat32": 4,
    "sitkFloat64": 8,
}
_LARGEST_HEADER = 1 << 16
_NRRD_RATIOS = {"raw": 1, "gz": LARGEST_DEFLATE_RATIO, "gzip": LARGEST_DEFLATE_RATIO}


@dataclasses.dataclass(frozen=True, eq=False)
class ItkFile:
    """A file in NRRD or MetaImage format.

    Attributes:
      path: the file.
      grid: its voxel grid.
      channels: length of the fourth axis, 1 if there is none.
    """

    path: Path
    grid: FileGrid
    channels: int

    @classmethod
    def open(cls, path: Path) -> "ItkFile":
        """Reads and checks the header of a file.

        Raises:
          VolumeError: if the file is missing or damaged, or claims more voxels than it can hold;
            if its voxels are in another file in another folder, in several files, or not plain
            binary numbers or deflated ones; if its array is not 3D or 4D or not of real numbers;
            if its affine does not place voxels in space; if SimpleITK is not installed.
        """
        import_simpleitk()
        capacity = _capacity(path)
        reader = _reader(path)
        call(path, reader.ReadImageInformation)
        shape = reader.GetSize()
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) not in (3, 4) or min(shape) < 1:
            raise VolumeError(f"{path}: shape {shape}, must be 3D, or 4D with channels last")
        itemsize = pixel_size(path, reader)
        claimed = math.prod(shape) * itemsize
        if claimed > capacity:
            raise VolumeError(
                f"{path}: its header claims {' x '.join(map(str, shape))} voxels of {itemsize} "
                f"bytes, {claimed} bytes; the file can hold {capacity}"
            )
        axes = len(reader.GetSize())
        direction = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3]
        affine = ras_affine(direction * reader.GetSpacing()[:3], reader.GetOrigin()[:3])
        check_affine(path, affine)
        x, y, z = shape[:3]
        return cls(path, FileGrid.from_affine((x, y, z), affine), math.prod(shape[3:]))

    def fill(self, image: np.ndarray) -> None:
        """Reads the voxels into an array [X, Y, Z, channels] of the canonical grid.

        Raises:
          VolumeError: if the voxels cannot be read.
        """
        read = call(self.path, _reader(self.path).Execute)
        # SimpleITK's arrays have the axes in reverse order.
        stored = import_simpleitk().GetArrayViewFromImage(read).T
        stored = stored.reshape((*self.grid.shape, self.channels), order="F")
        view = self.grid.view_on_file_axes(image)
        for channel in range(self.channels):
            for planes in plane_slabs(self.grid.shape, 8):
                view[:, :, planes, channel] = stored[:, :, planes, channel]


def pixel_size(path: Path, reader: Any) -> int:
    """Returns the bytes of a pixel.

    Raises:
      VolumeError: if pixels are not one real number each.
    """
    sitk = import_simpleitk()
    for name, itemsize in _REAL_PIXELS.items():
        if reader.GetPixelID() == getattr(sitk, name):
            return itemsize
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    raise VolumeError(f"{path}: voxels are {kind}, must be one real number each")


def ras_affine(columns: np.ndarray, origin: Sequence[float]) -> np.ndarray:
    """Makes an affine to right, anterior, superior of ITK's axes to left, posterior, superior.

    Args:
      columns: 3 x 3, the steps in mm from voxel to voxel along each axis, as columns.
      origin: center of the first voxel, in mm.
    """
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns, origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def call(path: Path, function: Any) -> Any:
    """Calls a function of SimpleITK; an error of it becomes one line."""
    try:
        return function()
    except MemoryError:
        raise VolumeError(f"{path}: its voxels are more than memory holds") from None
    except Exception as error:
        # The cause is after places in the source and addresses of objects.
        text = re.sub(r"\w+\(0x[0-9a-f]+\): ", "", " ".join(str(error).split()))
        cause = text.rsplit("ERROR: ", 1)[-1]
        raise VolumeError(f"{path}: not readable ({cause})") from None


def _reader(path: Path) -> Any:
    reader = import_simpleitk().ImageFileReader()
    # Otherwise the content could choose any of ITK's many formats.
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() == ".nrrd" else "MetaImageIO")
    call(path, lambda: reader.SetFileName(str(path)))
    return reader


def _capacity(path: Path) -> int:
    """Computes how many bytes of voxels a file can hold at most."""
    with open_regular_file(path) as file:
        head = file.read(_LARGEST_HEADER)
        size = os.fstat(file.fileno()).st_size
    if path.suffix.lower() == ".nrrd":
        return size * _nrrd_ratio(path, head)
    fields = _fields(head, "=", last="ElementDataFile")
    data = fields.get("ElementDataFile")
    if data is None or fields.get("BinaryData", "True").lower() != "true":
        raise VolumeError(f"{path}: not a MetaImage file of binary voxels")
    if data != "LOCAL":
        if data == "LIST" or "%" in data or Path(data).name != data:
            raise VolumeError(
                f"{path}: ElementDataFile = {data}, must be LOCAL or one file beside it"
            )
        with open_regular_file(path.with_name(data)) as file:
            size = os.fstat(file.fileno()).st_size
    compressed = fields.get("CompressedData", "False").lower() == "true"
    return size * LARGEST_DEFLATE_RATIO if compressed else size


def _nrrd_ratio(path: Path, head: bytes) -> int:
    """Returns how many bytes of voxels one byte of an NRRD file can stand for."""
    if not head.startswith(b"NRRD"):
        raise VolumeError(f"{path}: not an NRRD file")
    fields = {name.lower(): value for name, value in _fields(head, ":", last="").items()}
    if "data file" in fields or "datafile" in fields:
        raise VolumeError(f"{path}: its voxels are in another file, must be in the same")
    encoding = fields.get("encoding", "").lower()
    if encoding not in _NRRD_RATIOS:
        raise VolumeError(f"{path}: encoding {encoding!r}, must be {' or '.join(_NRRD_RATIOS)}")
    return _NRRD_RATIOS[encoding]


def _fields(head: bytes, separator: str, last: str) -> dict[str, str]:
    """Parses lines of names and values up to the line with the last name."""
    fields = {}
    for line in head.decode("latin-1").split("\n"):
        name, _, value = (part.strip() for part in line.partition(separator))
        fields[name] = value
        if name == last:
            break
    return fields
