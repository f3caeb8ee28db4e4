"""Label maps changed after the model: parts that are removed, filled or left out."""

from collections.abc import Callable, Iterable

import numpy as np

from unetr_flax.imaging.extras import import_ndimage


def keep_largest(labels: np.ndarray, ids: Iterable[int]) -> None:
    """Turns all but the largest connected part of each class into background, in place.

    Voxels are connected if they share a face, an edge or a corner.

    Args:
      labels: class ids [X, Y, Z].
      ids: classes to treat.

    Raises:
      VolumeError: if scipy is not installed.
    """
    ndimage = import_ndimage()

    def others(mask: np.ndarray, box: np.ndarray, label: int) -> None:
        parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
        if count > 1:
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0
            box[mask & (parts != sizes.argmax())] = 0

    _each(labels, ids, others)


def fill_holes(labels: np.ndarray, ids: Iterable[int]) -> None:
    """Gives a class the background that it encloses, in place; other classes inside stay.

    Background is enclosed if no path of voxels that share faces leads out of the class.

    Args:
      labels: class ids [X, Y, Z].
      ids: classes to treat, in this order.

    Raises:
      VolumeError: if scipy is not installed.
    """
    ndimage = import_ndimage()

    def fill(mask: np.ndarray, box: np.ndarray, label: int) -> None:
        box[ndimage.binary_fill_holes(mask) & (box == 0)] = label

    _each(labels, ids, fill)


def keep_only(labels: np.ndarray, ids: Iterable[int]) -> None:
    """Turns all classes but some into background, in place."""
    kept = np.zeros(int(np.iinfo(labels.dtype).max) + 1, labels.dtype)
    for label in ids:
        kept[label] = label
    for plane in labels:
        plane[...] = kept[plane]


def _each(
    labels: np.ndarray,
    ids: Iterable[int],
    change: Callable[[np.ndarray, np.ndarray, int], None],
) -> None:
    """Calls `change(mask, box, label)` with the bounding box of each class that is there."""
    boxes = import_ndimage().find_objects(labels)
    for label in ids:
        if 0 < label <= len(boxes) and boxes[label - 1] is not None:
            box = labels[boxes[label - 1]]
            change(box == label, box, label)
