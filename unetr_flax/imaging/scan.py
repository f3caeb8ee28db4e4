"""Scans of any kind of file, read onto the canonical grid."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unetr_flax.imaging.alignment import check_aligned
from unetr_flax.imaging.dicom_series import DicomSeries
from unetr_flax.imaging.dicom_slice import is_dicom
from unetr_flax.imaging.file_grid import NIFTI_ENDINGS, FileGrid
from unetr_flax.imaging.image_file import ImageFile
from unetr_flax.imaging.metaimage_file import open_metaimage
from unetr_flax.imaging.nifti_file import open_nifti
from unetr_flax.imaging.nrrd_file import open_nrrd
from unetr_flax.imaging.volume import Volume, VolumeError, count_not_finite

_OPENERS = {
    **dict.fromkeys(NIFTI_ENDINGS, open_nifti),
    ".nrrd": open_nrrd,
    ".mha": open_metaimage,
    ".mhd": open_metaimage,
}
SCAN_ENDINGS = tuple(_OPENERS)

_Opened = ImageFile | DicomSeries


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
    first, *others = _open(paths)
    files = [first, *(_aligned(file, first) for file in others)]
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


def _aligned(file: _Opened, first: _Opened) -> _Opened:
    """Returns the file of a channel with its axes matched with those of the first one."""
    grid = check_aligned(file.path, file.grid, first.path, first.grid, "the channels of a scan")
    return dataclasses.replace(file, grid=grid)


def _mend(path: Path, image: np.ndarray, allow_nan: bool) -> int:
    """Counts numbers that are not finite, and replaces them plane by plane if that is allowed."""
    count = count_not_finite(image)
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
