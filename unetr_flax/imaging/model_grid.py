"""The grid on which a model sees a scan, and the way back to the scan's own."""

import dataclasses

import numpy as np

from unetr_flax.imaging.intensity import background
from unetr_flax.imaging.padding import crop_or_pad
from unetr_flax.imaging.resampling import resample_linear, resample_nearest


@dataclasses.dataclass(frozen=True)
class ModelGrid:
    """A box of a scan's canonical grid, resampled.

    Attributes:
      scan_shape: voxels of the scan, [X, Y, Z].
      box_start: first voxel of the box.
      box_size: voxels of the box.
      shape: voxels of the model's grid over the box.
      spacing: mm per voxel of the model's grid.
    """

    scan_shape: tuple[int, ...]
    box_start: tuple[int, ...]
    box_size: tuple[int, ...]
    shape: tuple[int, ...]
    spacing: tuple[float, ...]

    def sample_image(self, image: np.ndarray) -> np.ndarray:
        """Brings an image [*scan_shape, C] to the model's grid, linearly: [*shape, C].

        Raises:
          ValueError: if the image has another shape.
          VolumeError: if it must be resampled and scipy is not installed.
        """
        self._check("image", image.shape[:-1], self.scan_shape)
        return resample_linear(crop_or_pad(image, self.box_start, self.box_size), self.shape)

    def sample_labels(self, labels: np.ndarray) -> np.ndarray:
        """Brings a label map [*scan_shape] to the model's grid, to the nearest: [*shape].

        Raises:
          ValueError: if the label map has another shape.
          VolumeError: if it must be resampled and scipy is not installed.
        """
        self._check("labels", labels.shape, self.scan_shape)
        return resample_nearest(crop_or_pad(labels, self.box_start, self.box_size), self.shape)

    def restore_logits(self, logits: np.ndarray) -> np.ndarray:
        """Brings logits [*shape, K] back to the scan's grid, linearly: [*scan_shape, K].

        Outside the box the softmax of the result is 1 for class 0, the background: its logit is 0
        and those of the other classes are minus infinity.

        Raises:
          ValueError: if the logits have another shape.
          VolumeError: if they must be resampled and scipy is not installed.
        """
        self._check("logits", logits.shape[:-1], self.shape)
        outside = np.full(logits.shape[-1], -np.inf)
        outside[0] = 0
        return self._uncrop(resample_linear(logits, self.box_size), outside)

    def restore_labels(self, labels: np.ndarray) -> np.ndarray:
        """Brings a label map [*shape] back to the scan's grid, to the nearest: [*scan_shape].

        Outside the box the result is 0, the background.

        Raises:
          ValueError: if the label map has another shape.
          VolumeError: if it must be resampled and scipy is not installed.
        """
        self._check("labels", labels.shape, self.shape)
        return self._uncrop(resample_nearest(labels, self.box_size), 0)

    def _uncrop(self, box: np.ndarray, fill: np.ndarray | int) -> np.ndarray:
        return crop_or_pad(box, [-start for start in self.box_start], self.scan_shape, fill)

    def _check(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise ValueError(f"{name}: spatial shape {shape}, must be {expected}")


def foreground_box(image: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Finds the smallest box with all voxels above the lowest intensity of their channel.

    Args:
      image: [*spatial, C].

    Returns:
      Start and size of the box; the whole image if each of its channels is constant.
    """
    inside = np.asarray((image > background(image)).any(-1))
    if not inside.any():
        return (0,) * inside.ndim, inside.shape
    edges = [_edges(inside, axis) for axis in range(inside.ndim)]
    return tuple(low for low, _ in edges), tuple(high - low for low, high in edges)


def _edges(inside: np.ndarray, axis: int) -> tuple[int, int]:
    """Returns the first index along an axis where anything is inside, and one after the last."""
    others = tuple(i for i in range(inside.ndim) if i != axis)
    indices = np.flatnonzero(inside.any(others))
    return int(indices[0]), int(indices[-1]) + 1
