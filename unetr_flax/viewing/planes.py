"""The three planes of a scan as a radiologist looks at them."""

import dataclasses
from collections.abc import Sequence

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

    def largest(self, labels: np.ndarray) -> int:
        """Finds the slice in which most voxels have a label, the middle one if none has."""
        others = tuple(axis for axis in range(3) if axis != self.normal)
        area = np.count_nonzero(labels, axis=others)
        return int(area.argmax()) if area.any() else labels.shape[self.normal] // 2


AXIAL = Plane("Axial", normal=2, across=0, down=1, edges=("R", "L", "A", "P"))
CORONAL = Plane("Coronal", normal=1, across=0, down=2, edges=("R", "L", "S", "I"))
SAGITTAL = Plane("Sagittal", normal=0, across=1, down=2, edges=("A", "P", "S", "I"))
PLANES = (AXIAL, CORONAL, SAGITTAL)


def largest_slices(
    labels: np.ndarray, classes: Sequence[int]
) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Finds the slices through the largest cross-sections of each class.

    Args:
      labels: class ids [X, Y, Z].
      classes: all class ids in the label map, ascending, without 0.

    Returns:
      For each class, the index along X, Y and Z of the slice in which most voxels are the class;
      and the same for all classes together (the middle slices if there is none).
    """
    rows = np.zeros(max(classes, default=0) + 1, np.intp)
    rows[list(classes)] = np.arange(len(classes))
    areas = [np.zeros((len(classes), size), np.int64) for size in labels.shape]
    for x, plane in enumerate(labels):
        y, z = np.nonzero(plane)
        row = rows[plane[y, z]]
        areas[0][:, x] = np.bincount(row, minlength=len(classes))
        for axis, index in ((1, y), (2, z)):
            size = labels.shape[axis]
            cells = np.bincount(row * size + index, minlength=len(classes) * size)
            areas[axis] += cells.reshape(areas[axis].shape)
    voxels = [tuple(int(area[i].argmax()) for area in areas) for i in range(len(classes))]
    if not classes:
        return voxels, tuple(size // 2 for size in labels.shape)
    return voxels, tuple(int(area.sum(0).argmax()) for area in areas)
