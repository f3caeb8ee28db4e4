"""Scans of any kind of file, read onto the canonical grid."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unetr_flax.imaging.dicom_series import DicomSeries
from unetr_flax.imaging.dicom_slice import is_dicom
from unetr_flax.imaging.file_grid import NIFTI_ENDINGS, FileGrid
from unetr_flax.imaging.image_file import ImageFile
from unetr_flax.imaging.metaimage_file import open_metaimage
from unetr_flax.imaging.nifti_file import open_nifti
from unetr_flax.imaging.nrrd_file import open_nrrd
from unetr_flax.imaging.volume import Volume, VolumeError

_OPENERS = {
    **dict.fromkeys(NIFTI_ENDINGS, open_nifti),
    ".nrrd": open_nrrd,
    ".mha": open_metaimage,
    ".mhd": open_metaimage,
}
SCAN_ENDINGS = tuple(_OPENERS)

_Opened = ImageFile | DicomSeries

# In voxels: how far the grids of two channels may be apart.
_TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Scan:
    """An image, and the grid of the file that it was read from.

    Attributes:
      volume: the image on the canonical grid, intensities [X, Y, Z, C].
      grid: the grid of its (first) file, onto which results are written.
      nan_voxels: how many numbers were NaN or infinite and are now the lowest of their channel.
    """

    volume: Volume
    grid: FileGrid
    nan_voxels: int


def read_scan(images: Path | str | Sequence[Path | str], *, allow_nan: bool = False) -> Scan:
    """Reads a scan onto the canonical grid.

    At the peak the memory holds the result, float32, and the stored numbers of one file.

    Args:
      images: a file in NIfTI, NRRD or MetaImage format, 3D, or 4D with channels last; or one 3D
        file per channel, all on one grid; or a folder with one DICOM series; or the files of one.
      allow_nan: whether voxels that are NaN or infinite become the lowest finite intensity of
        their channel, instead of being an error.

    Raises:
      VolumeError: if a file is missing, damaged or of another kind, or claims more voxels than it
        can hold; if voxels are not real numbers or not finite; if an affine does not place voxels
        in space; if the grids of channels differ by more than a tenth of a voxel; if slices of a
        DICOM series are missing, doubled or shifted; if a package that is needed is not installed.
    """
    paths = [Path(images)] if isinstance(images, Path | str) else [Path(path) for path in images]
    files = _open(paths)
    first = files[0]
    for file in files[1:]:
        _check_same_grid(first, file)
    channels = sum(file.channels for file in files)
    array = allocate(first.path, (*first.grid.canonical_shape, channels), np.float32)
    start = nan_voxels = 0
    for file in files:
        image = array[..., start : start + file.channels]
        # Numbers beyond float32 become infinite, which is counted below.
        with np.errstate(all="ignore"):
            file.fill(image)
        nan_voxels += _mend(file.path, image, allow_nan)
        start += file.channels
    return Scan(Volume(array, first.grid.canonical_affine), first.grid, nan_voxels)


def allocate(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Allocates an array for the voxels of a file.

    Raises:
      VolumeError: if there is not enough memory.
    """
    try:
        return np.empty(shape, dtype)
    except MemoryError:
        raise VolumeError(f"{path}: its voxels are more than memory holds") from None


def _open(paths: list[Path]) -> Sequence[_Opened]:
    """Opens the file of each channel, or a series of slices as the only one."""
    if not paths:
        raise VolumeError("no files of a scan are given")
    if len(paths) == 1 and paths[0].is_dir():
        return [DicomSeries.open_folder(paths[0])]
    if not paths[0].name.lower().endswith(SCAN_ENDINGS) and is_dicom(paths[0]):
        return [DicomSeries.open(paths)]
    files = [open_image_file(path) for path in paths]
    for file in files:
        if len(files) > 1 and file.channels > 1:
            raise VolumeError(f"{file.path}: {file.channels} channels, must be one per file")
    return files


def open_image_file(path: Path) -> ImageFile:
    """Reads and checks the header of a file in NIfTI, NRRD or MetaImage format.

    Raises:
      VolumeError: if the file is missing, damaged or of another kind, or claims more voxels than it
        can hold.
    """
    name = path.name.lower()
    for ending, opener in _OPENERS.items():
        if name.endswith(ending):
            return opener(path)
    pair = "; pairs .hdr and .img must be converted" if name.endswith((".hdr", ".img")) else ""
    raise VolumeError(
        f"{path}: must end in {', '.join(SCAN_ENDINGS)}, or be the folder of a DICOM series{pair}"
    )


def _check_same_grid(first: _Opened, other: _Opened) -> None:
    """Raises if two files are not on one grid; their axes may lie on disk in different orders."""
    shape, shape_of_first = other.grid.canonical_shape, first.grid.canonical_shape
    if shape != shape_of_first:
        raise VolumeError(
            f"{other.path}: grid of {shape} voxels, {first.path} has {shape_of_first}; the "
            "channels of a scan must be on one grid"
        )
    faces = [(-0.5, length - 0.5) for length in shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*faces)]).T
    shift = (other.grid.canonical_affine - first.grid.canonical_affine) @ corners
    voxels = np.linalg.solve(first.grid.canonical_affine[:3, :3], shift[:3])
    farthest = float(np.abs(voxels).max())
    if not farthest <= _TOLERANCE:
        mm = float(np.linalg.norm(shift[:3], axis=0).max())
        raise VolumeError(
            f"{other.path}: its grid is off by {farthest:.3g} voxels ({mm:.3g} mm) at a corner "
            f"from {first.path}; the channels of a scan must agree within {_TOLERANCE} voxels"
        )


def _mend(path: Path, image: np.ndarray, allow_nan: bool) -> int:
    """Counts numbers that are not finite, and replaces them if that is allowed.

    Planes are looked at one after the other, so that no mask of the whole image is in memory.
    """
    count = sum(plane.size - int(np.isfinite(plane).sum()) for plane in image)
    if not count:
        return 0
    if not allow_nan:
        raise VolumeError(f"{path}: {count} voxels are NaN or infinite, all must be finite")
    for channel in range(image.shape[-1]):
        planes = [image[x, ..., channel] for x in range(image.shape[0])]
        lowest = min(plane.min(where=np.isfinite(plane), initial=np.inf) for plane in planes)
        if not np.isfinite(lowest):
            raise VolumeError(f"{path}: channel {channel} has no finite voxel")
        for plane in planes:
            plane[~np.isfinite(plane)] = lowest
    return count
