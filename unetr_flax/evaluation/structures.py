"""The structures that are scored: classes of label maps, regions of classes, or masks."""

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from unetr_flax.evaluation.pairs import MapPair, Pair
from unetr_flax.evaluation.scores import LARGEST_LABEL, Scores, evaluate_case
from unetr_flax.imaging.volume import VolumeError

# Class ids by name of each region; regions may overlap, and count as structures 1, 2, ...
Regions = Mapping[str, Collection[int]]


def parse_regions(
    regions: Sequence[str], highest: int = LARGEST_LABEL
) -> dict[str, tuple[int, ...]]:
    """Reads regions in the form `NAME=ID,ID,...`, such as `WT=1,2,3` of BraTS.

    Args:
      regions: the values of an option --regions.
      highest: the highest class id that there is.

    Returns:
      Class ids by name, in the given order.

    Raises:
      ValueError: naming --regions and what is wrong.
    """
    found: dict[str, tuple[int, ...]] = {}
    for region in regions:
        name, _, numbers = region.rpartition("=")
        ids = numbers.split(",")
        if not name or not all(number.isascii() and number.isdigit() for number in ids):
            raise ValueError(f"--regions {region}: must be NAME=ID,ID,... such as WT=1,2,3")
        if name in found:
            raise ValueError(f"--regions {region}: must have a name of its own")
        if not all(1 <= int(number) <= highest for number in ids):
            raise ValueError(f"--regions {region}: ids must be 1 to {highest}")
        found[name] = tuple(int(number) for number in ids)
    return found


def score_structures(
    pair: Pair,
    maps: MapPair,
    ids: Collection[int] | None,
    regions: Regions | None,
    tolerance: float,
) -> dict[int, Scores]:
    """Scores the structures of a case.

    Args:
      pair: its files, for messages.
      maps: what they hold.
      ids: those to score; if None every class that occurs, every region or every mask.
      regions: the regions to score, if not classes; see `as_masks`.
      tolerance: as for `evaluate_case`.

    Returns:
      Scores by class id; by number from 1 if they are those of regions or masks.

    Raises:
      VolumeError: if there is one map and one file of masks, and no regions tell how they compare;
        if a file has another number of masks than there are regions.
      ValueError: as for `evaluate_case`.
    """
    score = functools.partial(
        evaluate_case, spacing=maps.spacing, tolerance=tolerance, voxel_ml=maps.voxel_ml
    )
    if regions is None and maps.prediction.ndim == maps.label.ndim == 3:
        return score(maps.prediction, maps.label, ids=ids)
    prediction = as_masks(pair.prediction, maps.prediction, regions)
    label = as_masks(pair.label, maps.label, regions)
    if len(prediction) != len(label):
        raise VolumeError(
            f"{pair.prediction}: {len(prediction)} masks, must be the {len(label)} of {pair.label}"
        )
    numbers = range(1, len(label) + 1) if ids is None else sorted(ids)
    return {
        number: score(prediction[number - 1], label[number - 1], ids={1})[1]
        if number <= len(label)
        else Scores.both_empty()
        for number in numbers
    }


def as_masks(path: Path, array: np.ndarray, regions: Regions | None) -> list[np.ndarray]:
    """Returns the masks of a file, 0 or 1 [X, Y, Z], one for each structure.

    Args:
      path: the file, for messages.
      array: class ids [X, Y, Z], or masks [X, Y, Z, R].
      regions: names and class ids of the structures; None if the file has masks.

    Raises:
      VolumeError: if the file has class ids, and no regions say what structures they form; if it
        has another number of masks than there are regions; if a mask has other numbers than 0, 1.
    """
    if array.ndim == 3:
        if regions is None:
            raise VolumeError(
                f"{path}: a label map, beside a file of masks; --regions NAME=ID,ID,... says which "
                "classes each mask has"
            )
        return [np.isin(array, list(ids)).astype(np.uint8) for ids in regions.values()]
    if regions is not None and array.shape[3] != len(regions):
        raise VolumeError(
            f"{path}: {array.shape[3]} masks, must be the {len(regions)} of --regions or --labels"
        )
    if not ((array == 0) | (array == 1)).all():
        raise VolumeError(f"{path}: masks from {array.min()} to {array.max()}, must be 0 and 1")
    return [array[..., i].astype(np.uint8) for i in range(array.shape[3])]


def painted(path: Path, array: np.ndarray, regions: Regions | None) -> np.ndarray:
    """Returns a map [X, Y, Z] to be drawn, where later structures cover earlier ones.

    Args:
      path: as for `as_masks`.
      array: as for `as_masks`.
      regions: as for `as_masks`.
    """
    if regions is None and array.ndim == 3:
        return array
    canvas = np.zeros(array.shape[:3], np.int32)
    for number, mask in enumerate(as_masks(path, array, regions), 1):
        canvas[mask == 1] = number
    return canvas
