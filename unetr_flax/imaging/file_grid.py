"""The voxel grid of a file as it lies on disk, and results written onto it."""

import dataclasses
import functools
import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unetr_flax.imaging.extras import import_nibabel
from unetr_flax.imaging.regular_file import reason
from unetr_flax.imaging.volume import VolumeError, escape
from unetr_flax.runtime.atomic import commit, staged, sync

NIFTI_ENDINGS = (".nii", ".nii.gz")
LARGEST_LABEL = np.iinfo(np.uint16).max

# Spacings in mm beyond which a header is damaged; resampling such a scan would fill any memory.
SMALLEST_SPACING, LARGEST_SPACING = 1e-6, 1e4

# Class ids compress well at any level, and floating numbers at none.
_COMPRESSION_LEVEL = 1
_SLAB_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class FileGrid:
    """The voxel grid of a scan's file.

    Arrays on the canonical grid [X, Y, Z, ...] are indexed along the patient's right, anterior and
    superior; the file's own axes are these in one of 48 orders and directions.

    Attributes:
      shape: voxels along the file's axes.
      affine: 4 x 4, maps the file's voxel indices to millimeters of the scanner.
      header: nibabel's header of NIfTI-1 or NIfTI-2, which written files have too but for what it
        says of the intensities: with its qform, sform, both codes, units and byte order.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    header: Any

    @classmethod
    def from_affine(cls, shape: tuple[int, int, int], affine: np.ndarray) -> "FileGrid":
        """Builds the grid of a file that is no NIfTI file."""
        nib = import_nibabel()
        fits = max(shape) <= np.iinfo(np.int16).max
        header = nib.Nifti1Header() if fits else nib.Nifti2Header()
        header.set_data_shape(shape)
        header.set_xyzt_units("mm")
        header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
        header.set_sform(affine, "scanner")
        try:
            header.set_qform(affine, "scanner", strip_shears=False)
        except nib.spatialimages.HeaderDataError:
            # A qform has no place for shears, and nibabel has set its code first.
            header["qform_code"] = 0
        return cls(shape, affine, header)

    @functools.cached_property
    def _orientation(self) -> np.ndarray:
        """For each axis of the file its canonical axis, and 1 or -1 for its direction."""
        return import_nibabel().io_orientation(self.affine)

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """Voxels along the canonical axes."""
        x, y, z = (self.shape[i] for i in np.argsort(self._orientation[:, 0]))
        return x, y, z

    @property
    def canonical_affine(self) -> np.ndarray:
        """The affine of the canonical grid, 4 x 4: voxel indices to millimeters of the scanner."""
        inverse = import_nibabel().orientations.inv_ornt_aff(self._orientation, self.shape)
        return self.affine @ inverse

    def view_on_file_axes(self, array: np.ndarray) -> np.ndarray:
        """Views an array [X, Y, Z, ...] of the canonical grid along the file's axes, uncopied."""
        axes = self._orientation[:, 0].astype(int)
        view = array.transpose(*axes, *range(3, array.ndim))
        return view[tuple(slice(None, None, int(step)) for step in self._orientation[:, 1])]

    def write_labels(self, path: Path | str, labels: np.ndarray) -> None:
        """Writes a label map to a NIfTI file on this grid, whole or not at all.

        The file's voxels are unsigned integers of 8 bits, or of 16 where a class id needs them.

        Args:
          path: the file to write; must end in .nii or .nii.gz.
          labels: class ids [X, Y, Z] on the canonical grid, integers; masks [X, Y, Z, R] become a
            4D file.

        Raises:
          VolumeError: if labels are not integers from 0 to 65535 on a grid of this shape, or if
            `path` has another ending.
          OSError: if the file cannot be written.
        """
        path = Path(path)
        check_ending(path, NIFTI_ENDINGS)
        self._check_shape(path, "labels", labels.shape[:3])
        if labels.dtype.kind not in "biu":
            raise VolumeError(f"{path}: labels are {labels.dtype}, must be integers")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest > LARGEST_LABEL:
            raise VolumeError(f"{path}: labels {lowest} to {highest}, must be 0 to {LARGEST_LABEL}")
        self._write(path, self.view_on_file_axes(labels), np.min_scalar_type(highest))

    def write_probabilities(self, path: Path | str, probabilities: np.ndarray) -> None:
        """Writes the probabilities of K classes to a 4D NIfTI file on this grid, as float32.

        The file is written whole or not at all.

        Args:
          path: the file to write; must end in .nii or .nii.gz.
          probabilities: [X, Y, Z, K] on the canonical grid, floating numbers.

        Raises:
          VolumeError: if the array has another shape or dtype, or `path` another ending.
          OSError: if the file cannot be written.
        """
        path = Path(path)
        check_ending(path, NIFTI_ENDINGS)
        self._check_shape(path, "probabilities", probabilities.shape[:3])
        if probabilities.ndim != 4 or not probabilities.shape[3] or probabilities.dtype.kind != "f":
            raise VolumeError(
                f"{path}: probabilities are {probabilities.dtype} {probabilities.shape}, must be "
                "floating numbers [X, Y, Z, K]"
            )
        self._write(path, self.view_on_file_axes(probabilities), np.dtype(np.float32))

    def _check_shape(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        if shape != self.canonical_shape:
            raise VolumeError(f"{path}: {name} have {shape}, the grid {self.canonical_shape}")

    def _write(self, path: Path, voxels: np.ndarray, dtype: np.dtype) -> None:
        """Writes an array along the file's axes; they are the first three."""
        dtype = dtype.newbyteorder(self.header.endianness)
        header = self._header_of(voxels.shape, dtype)
        try:
            with staged(path) as temporary:
                with temporary.open("wb") as file:
                    if path.suffix.lower() == ".gz":
                        with gzip.GzipFile("", "wb", _COMPRESSION_LEVEL, file, mtime=0) as stream:
                            _write_voxels(stream, header, voxels, dtype)
                    else:
                        _write_voxels(file, header, voxels, dtype)
                sync(temporary)
                commit(temporary, path)
        except OSError as error:
            # Python's message would name the staged file, or no file.
            raise type(error)(f"{escape(str(path))}: cannot be written ({reason(error)})") from None

    def _header_of(self, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
        """Makes the bytes before the voxels of a file with this grid."""
        header = self.header.copy()
        header.set_data_shape(shape)
        if len(shape) > 3:
            header["pixdim"][4] = 1
        header.set_data_dtype(dtype)
        header.set_slope_inter(1, 0)
        # The window in which viewers show the intensities of the scan, and what they mean.
        for field in ("cal_min", "cal_max", "intent_code", "intent_p1", "intent_p2", "intent_p3"):
            header[field] = 0
        header["intent_name"] = b""
        # Units of space without those of time.
        header["xyzt_units"] = header["xyzt_units"] % 8
        header["magic"] = header.single_magic
        header["vox_offset"] = header.single_vox_offset
        # No extensions follow.
        return header.binaryblock + bytes(header.single_vox_offset - header.sizeof_hdr)


def check_ending(path: Path, endings: tuple[str, ...]) -> None:
    """Raises VolumeError if the name of a file has none of the endings."""
    if not path.name.lower().endswith(endings):
        raise VolumeError(f"{path}: must end in {' or '.join(endings)}")


def check_affine(path: Path, affine: np.ndarray) -> None:
    """Raises VolumeError if an affine does not place voxels in space."""
    placed = bool(np.isfinite(affine).all())
    if placed:
        with np.errstate(over="ignore"):
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
        # A spacing of 0 is found with all other affines that are not invertible.
        if 0 < spacing.min() < SMALLEST_SPACING or spacing.max() > LARGEST_SPACING:
            raise VolumeError(
                f"{path}: voxels of {' x '.join(f'{mm:.4g}' for mm in spacing)} mm, must be "
                f"{SMALLEST_SPACING:g} to {LARGEST_SPACING:g} mm"
            )
        placed = not np.isnan(import_nibabel().io_orientation(affine)).any()
    if not placed:
        raise VolumeError(f"{path}: affine must be finite and invertible")


def plane_slabs(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """Splits the third of three axes into slabs of some megabytes, or of one plane if larger."""
    planes = max(1, _SLAB_BYTES // (itemsize * math.prod(shape[:2])))
    for start in range(0, shape[2], planes):
        yield slice(start, start + planes)


def _write_voxels(stream: Any, header: bytes, voxels: np.ndarray, dtype: np.dtype) -> None:
    stream.write(header)
    channels = [voxels] if voxels.ndim == 3 else [voxels[..., i] for i in range(voxels.shape[3])]
    for channel in channels:
        for planes in plane_slabs(channel.shape, dtype.itemsize):
            stream.write(channel[:, :, planes].astype(dtype).tobytes(order="F"))
