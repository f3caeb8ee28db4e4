"""Voxels as they are stored in a file; never more is read or allocated than the file can hold."""

import contextlib
import dataclasses
import gzip
import io
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from unetr_flax.imaging.regular_file import open_regular_file, reason
from unetr_flax.imaging.volume import VolumeError

# The most bytes that one byte of deflate can stand for, see zlib's technical notes.
_LARGEST_DEFLATE_RATIO = 1032

# Bytes that compressed data may go on after the last voxel.
_SLACK = 1 << 20
_CHUNK = 1 << 22

Compression = Literal["none", "gzip", "zlib"]


class Stream(Protocol):
    """The bytes of a file, decompressed."""

    def read(self, count: int, /) -> bytes:
        """Reads up to some number of bytes, none only at the end."""
        ...


@dataclasses.dataclass(frozen=True)
class StoredVoxels:
    """Where the voxels of a file are, and how they are stored.

    Attributes:
      path: the file that holds them.
      kind: its format, for messages.
      start: bytes of the file before they begin, or before the compressed data.
      compression: of the rest of the file.
      skip: bytes before the first voxel in the rest, decompressed.
      dtype: of a voxel.
      shape: lengths of the axes, the fastest first.
    """

    path: Path
    kind: str
    start: int
    compression: Compression
    skip: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def check_size(self, path: Path) -> None:
        """Raises VolumeError if there are more voxels than the file can hold.

        Args:
          path: the file whose header says how many there are, for the message.
        """
        with open_regular_file(self.path) as file:
            capacity = max(0, os.fstat(file.fileno()).st_size - self.start)
        if self.compression != "none":
            capacity *= _LARGEST_DEFLATE_RATIO
        claimed = self.skip + math.prod(self.shape) * self.dtype.itemsize
        if claimed > capacity:
            raise VolumeError(
                f"{path}: its header claims {' x '.join(map(str, self.shape))} voxels of "
                f"{self.dtype}, {claimed} bytes; the file can hold {capacity}"
            )

    def read(self) -> np.ndarray:
        """Reads the voxels: an array of `shape` in the order of the file.

        Raises:
          VolumeError: if the file ends early, compressed data go on beyond the last voxel or are
            damaged, or there is not enough memory.
        """
        with reading(self.path, self.kind, self.start, self.compression) as stream:
            left = self.skip
            while left:
                left -= len(_some(stream, left))
            # Memory of what turns out to be missing is not touched.
            stored = np.empty(math.prod(self.shape), self.dtype)
            rest = stored.view(np.uint8)
            while rest.size:
                block = _some(stream, rest.size)
                rest[: len(block)] = np.frombuffer(block, np.uint8)
                rest = rest[len(block) :]
            if self.compression != "none":
                # The checksum, which reveals damage, is read with the end.
                _read_rest(stream)
        return stored.reshape(self.shape, order="F")


@contextlib.contextmanager
def reading(
    path: Path, kind: str, start: int = 0, compression: Compression = "none"
) -> Iterator[Stream]:
    """Yields the bytes of a file from some place on, decompressed.

    Raises:
      VolumeError: if anything fails, here or with what is read; the message names the kind of file
        that it should be.
    """
    with open_regular_file(path) as file, _one_line(path, kind):
        file.seek(start)
        if compression == "gzip":
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream
        else:
            yield _Zlib(file) if compression == "zlib" else file


@contextlib.contextmanager
def _one_line(path: Path, kind: str) -> Iterator[None]:
    """Makes any error one line of a VolumeError."""
    try:
        yield
    except VolumeError:
        raise
    except MemoryError:
        raise VolumeError(f"{path}: its voxels are more than memory holds") from None
    # Errors of damaged headers and data have no class in common.
    except Exception as error:
        raise VolumeError(f"{path}: not a readable {kind} ({reason(error)})") from None


class _Zlib:
    """Decompressed bytes of a zlib stream."""

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self._zlib = zlib.decompressobj()

    def read(self, count: int) -> bytes:
        while not self._zlib.eof:
            block = self._zlib.unconsumed_tail or self._file.read(1 << 16)
            if decompressed := self._zlib.decompress(block, count):
                return decompressed
            if not block:
                raise EOFError("compressed data end before the end-of-stream marker")
        return b""


def _some(stream: Stream, count: int) -> bytes:
    """Reads at least one byte and at most `count` bytes."""
    block = stream.read(min(count, _CHUNK))
    if not block:
        raise EOFError(f"it ends {count} bytes before its last voxel")
    return block


def _read_rest(stream: Stream) -> None:
    """Reads what follows the last voxel; compressed data that go on and on are refused."""
    left = _SLACK
    while block := stream.read(left + 1):
        left -= len(block)
        if left < 0:
            raise ValueError(f"it goes on for more than {_SLACK} bytes after its last voxel")
