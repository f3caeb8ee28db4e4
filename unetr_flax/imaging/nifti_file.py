"""Headers of NIfTI files, read and checked."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from unetr_flax.imaging.extras import import_nibabel
from unetr_flax.imaging.file_grid import FileGrid, check_affine
from unetr_flax.imaging.image_file import ImageFile, check_array
from unetr_flax.imaging.stored_voxels import StoredVoxels, Stream, reading
from unetr_flax.imaging.volume import VolumeError

_KIND = "NIfTI file"
_LARGEST_HEADER = 540
_CIFTI_INTENTS = range(3000, 3100)

# nibabel logs each flaw of a header that it mends.
_SILENT = logging.Logger("nibabel's checks")
_SILENT.addHandler(logging.NullHandler())


def open_nifti(path: Path) -> ImageFile:
    """Reads the header of a file of NIfTI-1 or NIfTI-2, plain or compressed by gzip.

    The first bytes tell whether a file is compressed, whatever its name says.

    Raises:
      VolumeError: if the file is missing, damaged or not NIfTI, or claims more voxels than it can
        hold; if its array is not 3D or 4D or not of real numbers; if its affine does not place
        voxels in space; if nibabel is not installed.
    """
    import_nibabel()
    with reading(path, _KIND) as stream:
        compression = "gzip" if stream.read(2) == b"\x1f\x8b" else "none"
    with reading(path, _KIND, compression=compression) as stream:
        header = _parse_header(_head(stream))
        shape = _shape(header)
        dtype = header.get_data_dtype()
        skip = header.get_data_offset()
        slope, intercept = header.get_slope_inter()
        # A finite qform can still lead to an overflow, which check_affine reports.
        with np.errstate(all="ignore"):
            affine = header.get_best_affine()
    if header.sizeof_hdr == 540 and int(header["intent_code"]) in _CIFTI_INTENTS:
        raise VolumeError(f"{path}: a CIFTI file, which has no voxel grid; must be a volume")
    check_array(path, shape, dtype)
    voxels = StoredVoxels(path, _KIND, 0, compression, skip, dtype, shape)
    voxels.check_size(path)
    check_affine(path, affine)
    return ImageFile(
        path,
        FileGrid((shape[0], shape[1], shape[2]), affine, header),
        channels=shape[3] if len(shape) == 4 else 1,
        voxels=voxels,
        channel_axis=3 if len(shape) == 4 else None,
        slope=1.0 if slope is None else slope,
        intercept=0.0 if intercept is None else intercept,
    )


def _shape(header: Any) -> tuple[int, ...]:
    """Returns the lengths of the axes, without those beyond three at the end that have length 1."""
    shape = [int(length) for length in header.get_data_shape()]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _head(stream: Stream) -> bytes:
    """Reads as many bytes as the longest header has."""
    head = b""
    while more := stream.read(_LARGEST_HEADER - len(head)):
        head += more
    return head


def _parse_header(head: bytes) -> Any:
    """Parses and checks a header of NIfTI-1 or NIfTI-2; its first four bytes are its length."""
    nib = import_nibabel()
    if len(head) < 4:
        raise ValueError("an empty file")
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        for endianness in ("<", ">"):
            if np.frombuffer(head, f"{endianness}i4", 1) == kind.sizeof_hdr <= len(head):
                header = kind(head[: kind.sizeof_hdr], endianness, check=False)
                if header["magic"].item() == header.pair_magic:
                    raise ValueError("the header of a pair .hdr and .img, must be one file")
                if not 1 <= header["dim"][0] <= 7:
                    raise ValueError(f"{header['dim'][0]} axes, must be 1 to 7")
                header.check_fix(_SILENT, error_level=40)
                if not header["vox_offset"]:
                    raise ValueError("its header says that voxels begin at byte 0")
                return header
    raise ValueError("no header of NIfTI-1 or NIfTI-2")
