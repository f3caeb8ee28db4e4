"""Headers of MetaImage files (https://itk.org/Wiki/MetaIO/Documentation), read and checked."""

from pathlib import Path

import numpy as np

from unetr_flax.imaging.file_grid import FileGrid, check_affine
from unetr_flax.imaging.image_file import ImageFile, check_array, ras_affine
from unetr_flax.imaging.stored_voxels import StoredVoxels, reading

_KIND = "MetaImage file"
_LARGEST_HEADER = 1 << 18
_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def open_metaimage(path: Path) -> ImageFile:
    """Reads the header of a MetaImage file; of four axes the last is that of the channels.

    Raises:
      VolumeError: if the file, or the one beside it that holds the voxels, is missing or damaged,
        or holds less voxels than are claimed; if the voxels are in several files or in another
        folder, or are text; if the array is not 3D or 4D or not of real numbers; if the affine does
        not place voxels in space; if nibabel is not installed.
    """
    with reading(path, _KIND) as stream:
        fields, end = _fields(stream.read(_LARGEST_HEADER))
        shape = tuple(int(length) for length in fields["DimSize"].split())
        if len(shape) != int(fields["NDims"]):
            raise ValueError(f"NDims {fields['NDims']} with DimSize {fields['DimSize']}")
        dtype = _dtype(fields)
        check_array(path, shape, dtype)
        start = _header_size(fields)
        affine = _affine(fields, len(shape))
        data = _data_file(path, fields)
        compression = "zlib" if _is_true(fields, "CompressedData") else "none"
    voxels = StoredVoxels(data, _KIND, end if data == path else start, compression, 0, dtype, shape)
    voxels.check_size(path)
    check_affine(path, affine)
    return ImageFile(
        path,
        FileGrid.from_affine((shape[0], shape[1], shape[2]), affine),
        channels=shape[3] if len(shape) == 4 else 1,
        voxels=voxels,
        channel_axis=3 if len(shape) == 4 else None,
    )


def _fields(head: bytes) -> tuple[dict[str, str], int]:
    """Parses the lines of a header, and counts its bytes."""
    fields, end = {}, 0
    for line in head.split(b"\n"):
        end += len(line) + 1
        name, separator, value = line.decode("latin-1").partition("=")
        fields[name.strip()] = value.strip()
        if name.strip() == "ElementDataFile":
            break
        if name.strip() and not separator:
            raise ValueError("no header of MetaImage")
    for name in ("NDims", "DimSize", "ElementType", "ElementDataFile"):
        if not fields.get(name):
            raise ValueError(f"no field {name}")
    return fields, end


def _is_true(fields: dict[str, str], *names: str, default: bool = False) -> bool:
    """Parses the first of some fields that there is, which must be True or False."""
    text = next((fields[name] for name in names if name in fields), str(default))
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{names[0]} {text!r}, must be True or False")
    return text.lower() == "true"


def _dtype(fields: dict[str, str]) -> np.dtype:
    kind = fields["ElementType"]
    if kind not in _TYPES or int(fields.get("ElementNumberOfChannels", 1)) != 1:
        raise ValueError(
            f"{fields.get('ElementNumberOfChannels', 1)} numbers of type {kind} in each voxel, "
            f"must be one of type {', '.join(_TYPES)}"
        )
    if not _is_true(fields, "BinaryData", default=True):
        raise ValueError("its voxels are text, must be binary")
    is_big = _is_true(fields, "BinaryDataByteOrderMSB", "ElementByteOrderMSB")
    return np.dtype(_TYPES[kind]).newbyteorder(">" if is_big else "<")


def _header_size(fields: dict[str, str]) -> int:
    """Returns the bytes before the voxels in a file of their own."""
    size = int(fields.get("HeaderSize", 0))
    if size < 0:
        raise ValueError(f"HeaderSize {size}, must be 0 or above")
    return size


def _data_file(path: Path, fields: dict[str, str]) -> Path:
    """Returns the file that holds the voxels: the same one, or one beside it."""
    name = fields["ElementDataFile"]
    if name.upper() == "LOCAL":
        return path
    if name.upper().startswith("LIST") or "%" in name or Path(name).name != name:
        raise ValueError(f"ElementDataFile {name!r}, must be LOCAL or the name of a file beside it")
    return path.with_name(name)


def _affine(fields: dict[str, str], axes: int) -> np.ndarray:
    spacing = _numbers(fields, ("ElementSpacing", "ElementSize"), np.ones(axes))
    origin = _numbers(fields, ("Offset", "Position", "Origin"), np.zeros(axes))
    matrix = _numbers(fields, ("TransformMatrix", "Rotation", "Orientation"), np.eye(axes).ravel())
    # Each row is the direction of an axis.
    directions = matrix.reshape(axes, axes).T[:3, :3]
    return ras_affine(directions * spacing[:3], origin[:3])


def _numbers(fields: dict[str, str], names: tuple[str, ...], default: np.ndarray) -> np.ndarray:
    """Parses the numbers of the first field that there is."""
    text = next((fields[name] for name in names if name in fields), None)
    numbers = default if text is None else np.array([float(number) for number in text.split()])
    if numbers.shape != default.shape:
        raise ValueError(f"{names[0]} {text!r}, must be {default.size} numbers")
    return numbers
