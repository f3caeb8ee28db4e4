"""Headers of NRRD files (https://teem.sourceforge.net/nrrd/format.html), read and checked."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from unetr_flax.imaging.file_grid import FileGrid, check_affine
from unetr_flax.imaging.image_file import ImageFile, check_array, ras_affine
from unetr_flax.imaging.stored_voxels import StoredVoxels, reading

_KIND = "NRRD file"
_LARGEST_HEADER = 1 << 18
_COMPRESSIONS = {"raw": "none", "gz": "gzip", "gzip": "gzip"}
_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(
        ("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"
    ),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(
        ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"
    ),
    **dict.fromkeys(
        ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"
    ),
    "float": "f4",
    "double": "f8",
}

# Signs by which axes of a space become those to the left, posterior and superior. A file that names
# no space is taken as one of the latter, as ITK does.
_SPACES = {
    **dict.fromkeys(("", "left-posterior-superior", "lps"), (1, 1, 1)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (-1, -1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (1, -1, 1)),
}
_BYTE_ORDERS = {"little": "<", "big": ">"}

# What the axis of the channels may be; colors and tensors are no channels.
_CHANNEL_KINDS = ("list", "vector", "none", "???", "domain", "space", "time")


def open_nrrd(path: Path) -> ImageFile:
    """Reads the header of an NRRD file; one of four axes may be that of the channels.

    Raises:
      VolumeError: if the file is missing, damaged or not NRRD, or claims more voxels than it can
        hold; if its voxels are in another file or encoded otherwise than raw or by gzip; if its
        array is not 3D or 4D or not of real numbers; if its affine does not place voxels in space;
        if nibabel is not installed.
    """
    with reading(path, _KIND) as stream:
        head = stream.read(_LARGEST_HEADER)
        if not head.startswith(b"NRRD000"):
            raise ValueError("no header of NRRD")
        end = re.search(rb"\n\r?\n", head)
        if end is None:
            raise ValueError("no end of its header")
        fields = _fields(head[: end.start()].decode("latin-1"))
        if "data file" in fields or "datafile" in fields:
            raise ValueError("its voxels are in another file, must be in the same")
        shape = tuple(int(length) for length in fields["sizes"].split())
        compression = _choice(_COMPRESSIONS, "encoding", fields)
        dtype = _dtype(fields)
        check_array(path, shape, dtype)
        if int(fields.get("line skip", 0)) or int(fields.get("byte skip", 0)) < 0:
            raise ValueError("skips of lines and of unknown numbers of bytes are not read")
        skip = int(fields.get("byte skip", 0))
        channel_axis = _channel_axis(fields, len(shape))
        affine = _affine(fields, channel_axis)
    voxels = StoredVoxels(path, _KIND, end.end(), compression, skip, dtype, shape)
    voxels.check_size(path)
    check_affine(path, affine)
    x, y, z = (length for axis, length in enumerate(shape) if axis != channel_axis)
    channels = 1 if channel_axis is None else shape[channel_axis]
    grid = FileGrid.from_affine((x, y, z), affine)
    return ImageFile(path, grid, channels, voxels, channel_axis)


def _fields(header: str) -> dict[str, str]:
    """Parses the lines of a header; keys that users add and comments are left out."""
    fields = {}
    for line in header.splitlines()[1:]:
        name, separator, value = line.partition(": ")
        if separator and not line.startswith("#"):
            fields[name.strip().lower()] = value.strip()
    for name in ("type", "dimension", "sizes", "encoding"):
        if name not in fields:
            raise ValueError(f"no field {name!r}")
    if int(fields["dimension"]) != len(fields["sizes"].split()):
        raise ValueError(f"dimension {fields['dimension']} with sizes {fields['sizes']}")
    return fields


def _choice(choices: dict[str, Any], name: str, fields: dict[str, str]) -> Any:
    value = fields.get(name, "").lower()
    if value not in choices:
        raise ValueError(f"{name} {value!r}, must be one of {', '.join(filter(None, choices))}")
    return choices[value]


def _dtype(fields: dict[str, str]) -> np.dtype:
    dtype = np.dtype(_choice(_TYPES, "type", fields))
    order = "|" if dtype.itemsize == 1 else _choice(_BYTE_ORDERS, "endian", fields)
    return dtype.newbyteorder(order)


def _channel_axis(fields: dict[str, str], axes: int) -> int | None:
    """Finds the axis of the channels among four: the one without a direction, or else the last."""
    if axes != 4:
        return None
    directions = _vectors(fields.get("space directions", ""))
    without = [axis for axis, vector in enumerate(directions) if vector is None] or [3]
    kinds = fields.get("kinds", "").split()
    kind = kinds[without[0]] if len(kinds) == 4 else "list"
    if len(without) > 1 or kind not in _CHANNEL_KINDS:
        raise ValueError(f"kinds {fields.get('kinds', '')!r}, must be space and one of channels")
    return without[0]


def _affine(fields: dict[str, str], channel_axis: int | None) -> np.ndarray:
    columns, origin = np.eye(3), np.zeros(3)
    if "space directions" in fields:
        vectors = enumerate(_vectors(fields["space directions"]))
        # Four axes may lie in a space of four dimensions.
        columns = np.array([v[:3] for axis, v in vectors if v and axis != channel_axis]).T
    elif "spacings" in fields:
        spacings = [float(mm) for mm in fields["spacings"].split()]
        columns = np.diag([mm for axis, mm in enumerate(spacings) if axis != channel_axis])
    if "space origin" in fields:
        (origin,) = (np.array(v[:3]) for v in _vectors(fields["space origin"]) if v)
    if columns.shape != (3, 3) or origin.shape != (3,):
        raise ValueError("directions and origin must have three numbers for each of three axes")
    signs = np.array(_choice(_SPACES, "space", fields))
    return ras_affine(signs[:, None] * columns, signs * origin)


def _vectors(text: str) -> list[tuple[float, ...] | None]:
    """Parses vectors such as "(1,0,0) none (0,1,0)"."""
    return [
        None if part == "none" else tuple(float(number) for number in part[1:-1].split(","))
        for part in re.findall(r"none|\([^)]*\)", text)
    ]
