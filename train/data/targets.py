"""What a model is trained to predict at each voxel: one number that holds its class or its regions.

The target of a voxel is
  `IGNORED`, if the voxel does not count;
  its class id, if the data set has classes;
  the sum of 2^r over all regions r that hold the voxel, if the data set has regions.
So a target is one array of integers [*spatial] in either case, crops and nearest-neighbor sampling
need not know which, and 0 is always the background.
"""

from typing import Any

import numpy as np

from train.data.dataset import Dataset

IGNORED = -1
# int32 without its sign has so many bits.
MOST_REGIONS = 31


def encode(dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """Makes targets of a label map.

    Args:
      dataset: says what the numbers of its label maps mean.
      labels: [X, Y, Z, C], int32, as they are in the file.

    Returns:
      Targets [X, Y, Z], int32.

    Raises:
      ValueError: if there are channels or numbers that the data set does not declare.
    """
    channels = len(dataset.labels) - 1 if dataset.target == "masks" else 1
    if labels.shape[-1] != channels:
        raise ValueError(f"{labels.shape[-1]} channels, its label maps must have {channels}")
    if dataset.target == "masks":
        _check(labels, {0, 1, dataset.ignored_id}, "masks must hold 0 and 1")
        targets = np.zeros(labels.shape[:-1], np.int32)
        for region in range(channels):
            targets |= (labels[..., region] == 1).astype(np.int32) << region
        ignored = (labels == dataset.ignored_id).any(-1)
    else:
        labels = labels[..., 0]
        ids = _declared_ids(dataset)
        _check(labels, {*ids, dataset.ignored_id}, f"declared are {_ranges(ids)}")
        ignored = labels == dataset.ignored_id
        if dataset.target == "classes":
            targets = labels
        else:
            codes = np.zeros(max(ids) + 1, np.int32)
            for region, members in enumerate(dataset.regions):
                codes[list(members)] |= 1 << region
            targets = codes[np.where(ignored, 0, labels)]
    return np.where(ignored, np.int32(IGNORED), targets) if ignored.any() else targets


def region_masks(targets: Any, num_regions: int) -> Any:
    """Splits targets of a data set with regions into a mask of each region.

    Args:
      targets: [*spatial], signed integers; an array of NumPy or JAX.
      num_regions: number of regions R.

    Returns:
      0, 1 or `IGNORED` [*spatial, R], with the dtype of the targets.
    """
    shifts = np.arange(num_regions, dtype=targets.dtype)
    masks = (targets[..., None] >> shifts) & 1
    # All bits of an ignored voxel are 1, from which 2 makes -1.
    return masks - 2 * (targets == IGNORED).astype(targets.dtype)[..., None]


def drawn_classes(dataset: Dataset, targets: np.ndarray) -> np.ndarray:
    """Chooses one label per voxel to draw: of overlapping regions the last; 0 where ignored."""
    targets = np.where(targets == IGNORED, 0, targets)
    if not dataset.has_regions:
        return targets
    # The position of the highest bit; 0 has none.
    return np.frexp(targets.astype(np.float64))[1].astype(np.int32)


def count_labels(dataset: Dataset, targets: np.ndarray) -> list[int]:
    """Counts the voxels of each of the data set's labels, the background first."""
    background = int(np.count_nonzero(targets == 0))
    counts = [background]
    for i in range(1, len(dataset.labels)):
        if dataset.has_regions:
            member = (targets != IGNORED) & (targets >> (i - 1) & 1).astype(bool)
        else:
            member = targets == i
        counts.append(int(np.count_nonzero(member)))
    return counts


def _declared_ids(dataset: Dataset) -> set[int]:
    """Returns the ids that label maps of classes or regions may hold."""
    if dataset.target == "classes":
        return set(range(len(dataset.labels)))
    return {0}.union(*dataset.regions, dataset.unused_ids)


def _check(labels: np.ndarray, allowed: set[int | None], rule: str) -> None:
    unknown = sorted(set(_distinct(labels)) - allowed)
    if unknown:
        shown = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
        raise ValueError(f"label ids [{shown}], {rule}")


def _distinct(labels: np.ndarray) -> list[int]:
    """Lists the numbers of an array: by counting where the range is small, as sorting is slow."""
    low, high = int(labels.min()), int(labels.max())
    if high - low > np.iinfo(np.uint16).max:
        return np.unique(labels).tolist()
    found = np.zeros(high - low + 1, bool)
    found[labels - low] = True
    return (np.flatnonzero(found) + low).tolist()


def _ranges(ids: set[int]) -> str:
    """Shows ids, as a range where they have no gaps."""
    ordered = sorted(ids)
    if ordered == list(range(ordered[-1] + 1)):
        return f"0 to {ordered[-1]}"
    return ", ".join(map(str, ordered))
