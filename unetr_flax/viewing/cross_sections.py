"""How many voxels of each class lie in each slice, from which sizes and places follow."""

import dataclasses
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class CrossSections:
    """Numbers of voxels of each class in each slice of a label map, without the background.

    Attributes:
      ids: the classes that occur, ascending.
      areas: for each axis of the label map, the voxels of each class in each slice across it,
        [classes, slices], int64.
    """

    ids: tuple[int, ...]
    areas: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, labels: np.ndarray) -> Self:
        """Counts the voxels of a label map [X, Y, Z], integers of at least 0.

        One pass over the map, slice by slice: memory does not grow with voxels times classes.
        """
        ids = _ids(labels)
        rows = row_table(ids)
        _, *sizes = labels.shape
        areas = tuple(np.zeros((len(ids), size), np.int64) for size in labels.shape)
        for x, plane in enumerate(labels):
            where = np.nonzero(plane)
            row = rows[plane[where]]
            areas[0][:, x] = np.bincount(row, minlength=len(ids))
            for area, index, size in zip(areas[1:], where, sizes, strict=True):
                cells = np.bincount(row * size + index, minlength=len(ids) * size)
                area += cells.reshape(area.shape)
        return cls(ids, areas)

    @property
    def voxels(self) -> np.ndarray:
        """Number of voxels of each class, [classes], int64."""
        return self.areas[0].sum(1)

    @property
    def centroids(self) -> np.ndarray:
        """Mean voxel index of each class along X, Y and Z, [classes, 3]."""
        sums = np.stack([area @ np.arange(area.shape[1]) for area in self.areas], axis=1)
        return sums / self.voxels[:, None]

    @property
    def boxes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each class, the first voxel of its smallest box, and one past the last."""
        ends = [[np.flatnonzero(row)[[0, -1]].tolist() for row in area] for area in self.areas]
        return [
            (tuple(first for first, _ in axes), tuple(last + 1 for _, last in axes))
            for axes in zip(*ends, strict=True)
        ]

    @property
    def largest(self) -> list[tuple[int, ...]]:
        """For each class, the slices along X, Y and Z with most of its voxels."""
        return list(zip(*(area.argmax(1).tolist() for area in self.areas), strict=True))

    @property
    def largest_of_all(self) -> tuple[int, ...]:
        """The slices along X, Y and Z with most labeled voxels; the middle ones if none is."""
        if not self.ids:
            return tuple(area.shape[1] // 2 for area in self.areas)
        return tuple(int(area.sum(0).argmax()) for area in self.areas)


def row_table(ids: tuple[int, ...]) -> np.ndarray:
    """Makes a table from class id to its position among some ids, 0 for all others."""
    rows = np.zeros(max(ids, default=0) + 1, np.intp)
    rows[list(ids)] = np.arange(len(ids))
    return rows


def _ids(labels: np.ndarray) -> tuple[int, ...]:
    """Finds the classes that occur, ascending, without 0."""
    found = np.zeros(int(labels.max(initial=0)) + 1, bool)
    for plane in labels:
        found[plane.ravel()] = True
    return tuple(int(label) for label in np.flatnonzero(found) if label)
