"""A scan in memory, on the canonical grid, and the error of scans that cannot be used."""

import dataclasses

import numpy as np


class VolumeError(ValueError):
    """A scan that cannot be used; the message is one line that names the file.

    Characters that cannot be printed, such as a line break in the name of a file, are escaped.
    """

    def __init__(self, message: str):
        super().__init__(escape(message))


def escape(text: str) -> str:
    """Writes characters that cannot be printed, line breaks among them, as escape sequences."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclasses.dataclass(frozen=True)
class Volume:
    """An image on the canonical grid: axes run to the patient's right, anterior and superior.

    Attributes:
      array: intensities [X, Y, Z, C], float32.
      affine: 4 x 4, maps voxel indices to millimeters of the scanner.
    """

    array: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between neighboring voxels along each axis, in mm."""
        return tuple(float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml."""
        return voxel_ml(self.affine)


def count_not_finite(image: np.ndarray) -> int:
    """Counts numbers that are NaN or infinite.

    Planes are looked at one after the other, so that no mask of the whole image is in memory.
    """
    return sum(plane.size - int(np.isfinite(plane).sum()) for plane in image)


def voxel_ml(affine: np.ndarray) -> float:
    """Returns the volume of a voxel in ml; axes need not be at right angles."""
    return float(abs(np.linalg.det(affine[:3, :3]))) / 1000
