"""Volumes on disk as arrays on a canonical grid, and back."""

import dataclasses
import gzip
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np

# Soft tissue in Hounsfield units, as MONAI's and the paper's abdominal CT (section 4.2).
CT_WINDOW = (-175.0, 250.0)

ENDINGS = (".nii", ".nii.gz")
LARGEST_LABEL = np.iinfo(np.uint16).max


class VolumeError(ValueError):
    """A file that cannot be used; the message is one line that names it."""


@dataclasses.dataclass(frozen=True)
class Volume:
    """An image on the canonical grid: axes run to the patient's right, anterior and superior.

    Attributes:
      array: intensities [X, Y, Z, C], float32.
      affine: voxel indices to millimeters of the scanner, 4 x 4.
    """

    array: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance of neighboring voxels along each axis, in mm."""
        return tuple(float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))


def read_volume(path: Path | str) -> Volume:
    """Reads an image in NIfTI format; a fourth axis is its channels.

    Raises:
      VolumeError: if the file is missing, damaged, not NIfTI, not 3D or 4D, not of real numbers
        (colors, complex), or not finite; if its affine does not place voxels in space.
    """
    array, affine = _read(Path(path))
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape:
        raise VolumeError(f"{path}: shape {array.shape}, must be 3D, or 4D with channels last")
    # What float32 cannot hold becomes infinite, and is told as such.
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    broken = int(array.size - np.isfinite(array).sum())
    if broken:
        raise VolumeError(f"{path}: {broken} voxels are NaN or infinite, all must be finite")
    return Volume(array, affine)


def read_labels(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map: class ids [X, Y, Z], int32, on the canonical grid, and its affine.

    Raises:
      VolumeError: as `read_volume`, and if voxels are not whole numbers.
    """
    array, affine = _read(Path(path))
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or 0 in array.shape:
        raise VolumeError(f"{path}: shape {array.shape}, must be 3D")
    # NaN and what int32 cannot hold becomes some other number, which the comparison finds.
    with np.errstate(invalid="ignore"):
        labels = array.astype(np.int32)
    if not np.array_equal(labels, array):
        raise VolumeError(f"{path}: labels must be whole numbers")
    return np.ascontiguousarray(labels), affine


def write_labels(path: Path | str, labels: np.ndarray, like: Path | str) -> None:
    """Writes class ids [X, Y, Z] of the canonical grid onto the grid of the file `like`.

    The inverse of `read_labels`: the written file has the axes, affine, qform, sform and units of
    `like`, and whole numbers of 8 bits, or 16 where a class id needs them.

    Raises:
      VolumeError: if `like` cannot be read or its grid has another shape, if a label is negative
        or above 65535, or if `path` does not end in .nii or .nii.gz.
      OSError: if `path` cannot be written.
    """
    nib = _nibabel()
    _check_ending(Path(path))
    original = _load(Path(like))
    to_canonical = nib.io_orientation(original.affine)
    canonical = nib.apply_orientation(np.empty(original.shape[:3], bool), to_canonical)
    if labels.shape != canonical.shape:
        raise VolumeError(f"{like}: grid {canonical.shape}, labels have {labels.shape}")
    back = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.io_orientation(original.affine)
    )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest > LARGEST_LABEL:
        raise VolumeError(f"{path}: labels {lowest} to {highest}, must be 0 to {LARGEST_LABEL}")
    array = nib.apply_orientation(labels, back).astype(np.min_scalar_type(highest))
    image = type(original)(array, original.affine, original.header)
    image.set_data_dtype(array.dtype)
    # The window in which viewers show `like` is one of its intensities.
    image.header["cal_min"] = image.header["cal_max"] = 0
    nib.save(image, path)


def normalize_ct(array: np.ndarray, window: tuple[float, float] = CT_WINDOW) -> np.ndarray:
    """Hounsfield units clipped to a window and scaled to [0, 1]; float32, same shape."""
    low, high = window
    return ((np.clip(array, low, high) - low) / (high - low)).astype(np.float32)


def normalize_mri(array: np.ndarray) -> np.ndarray:
    """Each channel of [X, Y, Z, C] clipped to its 0.5 and 99.5 percentiles, mean 0, deviation 1.

    Percentiles, mean and deviation are those of the non-zero voxels, since MRI has no unit and
    whatever lies outside the body is zero. The result is float32.
    """
    out = np.empty(array.shape, np.float32)
    for channel in range(array.shape[-1]):
        values = array[..., channel]
        body = values[values != 0]
        if not body.size:
            body = values.ravel()
        low, high = np.percentile(body, (0.5, 99.5))
        clipped = np.clip(body, low, high)
        deviation = clipped.std() or 1.0
        out[..., channel] = (np.clip(values, low, high) - clipped.mean()) / deviation
    return out


def _nibabel() -> ModuleType:
    try:
        return importlib.import_module("nibabel")
    except ModuleNotFoundError:
        raise VolumeError("NIfTI files need nibabel: pip install 'unetr-flax[volumes]'") from None


def _check_ending(path: Path) -> None:
    if not path.name.lower().endswith(ENDINGS):
        raise VolumeError(f"{path}: must end in {' or '.join(ENDINGS)}")


def _load(path: Path):
    """The image, of which nibabel has read the header so far."""
    nib = _nibabel()
    if not path.is_file():
        raise VolumeError(f"{path}: no such file")
    _check_ending(path)
    # What a damaged file raises in nibabel has no class in common.
    try:
        image = nib.load(path)
    except Exception as error:
        raise VolumeError(f"{path}: not a readable NIfTI file ({_line(error)})") from None
    if not np.isfinite(image.affine).all() or np.isnan(nib.io_orientation(image.affine)).any():
        raise VolumeError(f"{path}: affine must be finite and invertible")
    if image.get_data_dtype().kind not in "iuf":
        raise VolumeError(f"{path}: voxels are {image.get_data_dtype()}, must be real numbers")
    return image


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels with the file's scaling, and affine, both reoriented to the canonical grid."""
    nib = _nibabel()
    image = _load(path)
    try:
        if path.suffix.lower() == ".gz":
            # nibabel stops at the last voxel; the checksum, which tells of damage, is after it.
            image = type(image).from_bytes(gzip.decompress(path.read_bytes()))
        image = nib.as_closest_canonical(image)
        array = np.asanyarray(image.dataobj)
    except Exception as error:
        raise VolumeError(f"{path}: not a readable NIfTI file ({_line(error)})") from None
    return array, image.affine


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
