"""The result of segmenting a scan: its label map, or a mask of each region."""

import dataclasses
from pathlib import Path

import numpy as np

from unetr_flax.imaging.file_grid import FileGrid
from unetr_flax.imaging.volume import Volume, VolumeError


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The label map of a scan, or its masks.

    Attributes:
      labels: class ids [X, Y, Z] on the scan's canonical grid, the smallest unsigned integers; of
        overlapping regions that do not turn back into classes, masks of 0 and 1 [X, Y, Z, R].
      names: name of each class id, as far as the model knows them; mask r counts as class r + 1.
      volume: the scan, on the same grid; None if it was let go.
      grid: the grid of the scan's file; None if it came as an array.
      probabilities: softmax [X, Y, Z, K] of the logits, of regions their sigmoid, if they were
        asked for.
    """

    labels: np.ndarray
    names: dict[int, str]
    volume: Volume | None
    grid: FileGrid | None
    probabilities: np.ndarray | None = None

    @property
    def has_masks(self) -> bool:
        """Whether the labels are one mask per region."""
        return self.labels.ndim == 4

    @property
    def visible(self) -> np.ndarray:
        """The label map, or class ids of which the last of overlapping masks is in front."""
        if not self.has_masks:
            return self.labels
        visible = np.zeros(self.labels.shape[:-1], np.min_scalar_type(self.labels.shape[-1]))
        for region in range(self.labels.shape[-1]):
            visible[self.labels[..., region] == 1] = region + 1
        return visible

    def count_voxels(self) -> dict[int, int]:
        """Counts the voxels of each class id that occurs, of masks without the background."""
        if self.has_masks:
            sums = np.count_nonzero(self.labels, axis=(0, 1, 2))
            counts = np.concatenate([[0], sums])
        else:
            counts = np.zeros(int(self.labels.max(initial=0)) + 1, np.int64)
            for plane in self.labels:
                counts += np.bincount(plane.ravel(), minlength=len(counts))
        return {int(label): int(counts[label]) for label in np.flatnonzero(counts)}

    def save(self, path: Path | str) -> None:
        """Writes the labels to a NIfTI file on the grid of the scan's file; masks become 4D.

        Raises:
          VolumeError: if the scan came as an array, or the file has another ending.
          OSError: if the file cannot be written.
        """
        if self.grid is None:
            raise VolumeError(f"{path}: the scan came as an array, its file's grid is not known")
        self.grid.write_labels(path, self.labels)
