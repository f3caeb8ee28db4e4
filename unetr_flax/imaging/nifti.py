"""NIfTI files read onto the canonical grid, and label maps written back onto a file's own grid."""

import gzip
from pathlib import Path

import numpy as np

from unetr_flax.imaging.extras import import_nibabel
from unetr_flax.imaging.volume import Volume, VolumeError

ENDINGS = (".nii", ".nii.gz")
LARGEST_LABEL = np.iinfo(np.uint16).max


def read_volume(path: Path | str) -> Volume:
    """Reads an image in NIfTI format onto the canonical grid; a fourth axis is its channels.

    Args:
      path: a file that ends in .nii or .nii.gz.

    Raises:
      VolumeError: if the file is missing, damaged or not NIfTI; if its array is not 3D or 4D, is
        not of real numbers (colors, complex numbers) or not finite; if its affine does not place
        voxels in space; if nibabel is not installed.
    """
    array, affine = _read(Path(path))
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape:
        raise VolumeError(f"{path}: shape {array.shape}, must be 3D, or 4D with channels last")
    # Numbers beyond float32 become infinite, which the check below reports.
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    broken = int(array.size - np.isfinite(array).sum())
    if broken:
        raise VolumeError(f"{path}: {broken} voxels are NaN or infinite, all must be finite")
    return Volume(array, affine)


def read_labels(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map in NIfTI format onto the canonical grid.

    Args:
      path: a file that ends in .nii or .nii.gz.

    Returns:
      Class ids [X, Y, Z], int32; and the affine, 4 x 4, voxel indices to millimeters.

    Raises:
      VolumeError: as for `read_volume`, and if voxels are not whole numbers.
    """
    array, affine = _read(Path(path))
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or 0 in array.shape:
        raise VolumeError(f"{path}: shape {array.shape}, must be 3D")
    # NaN and numbers beyond int32 become other numbers, which the comparison finds.
    with np.errstate(invalid="ignore"):
        labels = array.astype(np.int32)
    if not np.array_equal(labels, array):
        raise VolumeError(f"{path}: labels must be whole numbers")
    return np.ascontiguousarray(labels), affine


def write_labels(path: Path | str, labels: np.ndarray, like: Path | str) -> None:
    """Writes a label map of the canonical grid onto the grid of another file.

    The inverse of `read_labels`: the written file has the axes, affine, qform, sform and units of
    `like`, and unsigned integers of 8 bits, or of 16 where a class id needs them.

    Args:
      path: the file to write; must end in .nii or .nii.gz.
      labels: class ids [X, Y, Z] on the canonical grid.
      like: the NIfTI file on whose grid they are written.

    Raises:
      VolumeError: if `like` cannot be read or its grid has another shape, if a label is negative
        or above 65535, or if `path` does not end in .nii or .nii.gz.
      OSError: if `path` cannot be written.
    """
    nib = import_nibabel()
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
    # These two fields are the window in which viewers show the intensities of `like`.
    image.header["cal_min"] = image.header["cal_max"] = 0
    nib.save(image, path)


def _check_ending(path: Path) -> None:
    if not path.name.lower().endswith(ENDINGS):
        raise VolumeError(f"{path}: must end in {' or '.join(ENDINGS)}")


def _load(path: Path):
    """Opens an image and checks its header; the voxels are not read yet."""
    nib = import_nibabel()
    if not path.is_file():
        raise VolumeError(f"{path}: no such file")
    _check_ending(path)
    # The errors that nibabel raises for damaged files have no class in common.
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
    """Reads scaled voxels and affine, both reoriented to the canonical grid."""
    nib = import_nibabel()
    image = _load(path)
    try:
        if path.suffix.lower() == ".gz":
            # nibabel stops reading at the last voxel, before the checksum that reveals damage.
            image = type(image).from_bytes(gzip.decompress(path.read_bytes()))
        image = nib.as_closest_canonical(image)
        array = np.asanyarray(image.dataobj)
    except Exception as error:
        raise VolumeError(f"{path}: not a readable NIfTI file ({_line(error)})") from None
    return array, image.affine


def _line(error: Exception) -> str:
    """Formats an error's message as one line."""
    return " ".join(str(error).split()) or type(error).__name__
