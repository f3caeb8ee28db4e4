"""The three planes of a scan as a radiologist looks at them."""

import dataclasses

import numpy as np

CONVENTION = "Radiological convention: the patient's right is on the left of the picture."


@dataclasses.dataclass(frozen=True)
class Plane:
    """One of the three planes, as an image whose rows run down and columns to the right.

    Both directions run against the axes of the canonical grid, which point to the patient's right,
    anterior and superior. The axial and coronal planes are seen from the patient's feet and front
    (radiological convention), the sagittal one with the face to the left.

    Attributes:
      name: name of the plane.
      normal: axis of the canonical grid that is constant in the plane.
      across: axis of the grid along rows of pixels.
      down: axis of the grid along columns of pixels.
      edges: letters of the directions to the left, right, top and bottom edge.
    """

    name: str
    normal: int
    across: int
    down: int
    edges: tuple[str, str, str, str]

    def take(self, array: np.ndarray, index: int) -> np.ndarray:
        """Takes a slice of an array [X, Y, Z] as an image [rows, columns]."""
        return array.take(index, self.normal).T[::-1, ::-1]


AXIAL = Plane("Axial", normal=2, across=0, down=1, edges=("R", "L", "A", "P"))
CORONAL = Plane("Coronal", normal=1, across=0, down=2, edges=("R", "L", "S", "I"))
SAGITTAL = Plane("Sagittal", normal=0, across=1, down=2, edges=("A", "P", "S", "I"))
PLANES = (AXIAL, CORONAL, SAGITTAL)
