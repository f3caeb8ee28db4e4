"""NIfTI files read safely: nothing is allocated that a header claims and the file cannot hold."""

import contextlib
import dataclasses
import gzip
import io
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unetr_flax.imaging.extras import import_nibabel
from unetr_flax.imaging.file_grid import FileGrid, check_affine, plane_slabs
from unetr_flax.imaging.regular_file import open_regular_file, reason
from unetr_flax.imaging.volume import VolumeError

# The most bytes that one byte of deflate can stand for, see zlib's technical notes.
LARGEST_DEFLATE_RATIO = 1032

# Bytes that a compressed file may have after its last voxel.
_SLACK = 1 << 20
_CHUNK = 1 << 22
_CIFTI_INTENTS = range(3000, 3100)

_Stream = io.BufferedReader | gzip.GzipFile

# nibabel logs each flaw of a header that it mends.
_SILENT = logging.Logger("nibabel's checks")
_SILENT.addHandler(logging.NullHandler())


@dataclasses.dataclass(frozen=True, eq=False)
class NiftiFile:
    """A file of NIfTI-1 or NIfTI-2 in either byte order, plain or compressed by gzip.

    Attributes:
      path: the file.
      grid: its voxel grid.
      channels: length of the fourth axis, 1 if there is none.
      dtype: of the voxels as they are stored.
      offset: bytes before the first voxel.
      slope: stored numbers are multiplied by this.
      intercept: and this is added.
    """

    path: Path
    grid: FileGrid
    channels: int
    dtype: np.dtype
    offset: int
    slope: float
    intercept: float

    @classmethod
    def open(cls, path: Path) -> "NiftiFile":
        """Reads and checks the header of a file.

        Raises:
          VolumeError: if the file is missing, damaged or not NIfTI, or claims more voxels than it
            can hold; if its array is not 3D or 4D or not of real numbers; if its affine does not
            place voxels in space; if nibabel is not installed.
        """
        import_nibabel()
        with _reading(path) as (stream, capacity):
            header = _parse_header(_read_up_to(stream, 540))
            shape = [int(length) for length in header.get_data_shape()]
            dtype = header.get_data_dtype()
            offset = header.get_data_offset()
            slope, intercept = header.get_slope_inter()
            # A finite qform can still lead to an overflow, which check_affine reports.
            with np.errstate(all="ignore"):
                affine = header.get_best_affine()
        if header.sizeof_hdr == 540 and int(header["intent_code"]) in _CIFTI_INTENTS:
            raise VolumeError(f"{path}: a CIFTI file, which has no voxel grid; must be a volume")
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) not in (3, 4) or min(shape) < 1:
            raise VolumeError(f"{path}: shape {tuple(shape)}, must be 3D, or 4D with channels last")
        if dtype.kind not in "iuf":
            names = f"colors ({', '.join(dtype.names)})" if dtype.names else str(dtype)
            raise VolumeError(f"{path}: voxels are {names}, must be real numbers")
        claimed = offset + math.prod(shape) * dtype.itemsize
        if claimed > capacity:
            raise VolumeError(
                f"{path}: its header claims {' x '.join(map(str, shape))} voxels of {dtype}, "
                f"{claimed} bytes; the file can hold {capacity}"
            )
        check_affine(path, affine)
        x, y, z = shape[:3]
        return cls(
            path,
            FileGrid((x, y, z), affine, header),
            math.prod(shape[3:]),
            dtype,
            offset,
            1.0 if slope is None else slope,
            0.0 if intercept is None else intercept,
        )

    def fill(self, image: np.ndarray) -> None:
        """Reads the scaled voxels into an array [X, Y, Z, channels] of the canonical grid.

        Raises:
          VolumeError: if the file ends early, goes on beyond its last voxel, or its checksum is
            wrong.
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
        shape = (*self.grid.shape, self.channels)
        with _reading(self.path) as (stream, _):
            _skip(stream, self.offset)
            stored = np.empty(math.prod(shape), self.dtype)
            rest = stored.view(np.uint8).data
            while len(rest):
                count = stream.readinto(rest[:_CHUNK])
                if not count:
                    raise EOFError(f"it ends {len(rest)} bytes before its last voxel")
                rest = rest[count:]
            if isinstance(stream, gzip.GzipFile):
                # The checksum, which reveals damage, is read with the end.
                _read_rest(stream)
        return stored.reshape(shape, order="F")

    def scale(self, stored: np.ndarray) -> np.ndarray:
        """Applies the slope and the intercept to stored numbers, in float64 if there are any."""
        if (self.slope, self.intercept) == (1, 0):
            return stored
        # Overflows become infinite, which readers of intensities and labels report.
        with np.errstate(all="ignore"):
            return stored * np.float64(self.slope) + np.float64(self.intercept)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[tuple[_Stream, int]]:
    """Yields a stream of a file's bytes, decompressed, and how many there can be at most.

    The first bytes tell whether a file is compressed, whatever its name says. Errors of the body
    become one line.
    """
    with open_regular_file(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if compressed:
                with gzip.GzipFile(fileobj=file) as stream:
                    yield stream, size * LARGEST_DEFLATE_RATIO
            else:
                yield file, size
        except VolumeError:
            raise
        except MemoryError:
            raise VolumeError(f"{path}: its voxels are more than memory holds") from None
        # The errors that nibabel raises for damaged headers have no class in common.
        except Exception as error:
            raise VolumeError(f"{path}: not a readable NIfTI file ({reason(error)})") from None


def _parse_header(block: bytes) -> Any:
    """Parses and checks a header of NIfTI-1 or NIfTI-2; its first four bytes are its length."""
    nib = import_nibabel()
    if len(block) < 4:
        raise ValueError("an empty file")
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        for endianness in ("<", ">"):
            if np.frombuffer(block, f"{endianness}i4", 1) == kind.sizeof_hdr <= len(block):
                header = kind(block[: kind.sizeof_hdr], endianness, check=False)
                if header["magic"].item() == header.pair_magic:
                    raise ValueError("the header of a pair .hdr and .img, must be one file")
                if not 1 <= header["dim"][0] <= 7:
                    raise ValueError(f"{header['dim'][0]} axes, must be 1 to 7")
                header.check_fix(_SILENT, error_level=40)
                return header
    raise ValueError("no header of NIfTI-1 or NIfTI-2")


def _read_up_to(stream: _Stream, count: int) -> bytes:
    block = b""
    while len(block) < count and (more := stream.read(count - len(block))):
        block += more
    return block


def _skip(stream: _Stream, count: int) -> None:
    while count:
        skipped = len(stream.read(min(count, _CHUNK)))
        if not skipped:
            raise EOFError(f"it ends {count} bytes before its first voxel")
        count -= skipped


def _read_rest(stream: gzip.GzipFile) -> None:
    """Reads what follows the last voxel; a compressed file that goes on and on is refused."""
    if len(_read_up_to(stream, _SLACK + 1)) > _SLACK:
        raise ValueError(f"it goes on for more than {_SLACK} bytes after the voxels of its header")
