"""The scores of one case: how well each label of a prediction agrees with the true one."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, Self

import numpy as np

from unetr_flax.evaluation.dice import DiceCounts
from unetr_flax.evaluation.surface_distance import SurfaceDistances
from unetr_flax.imaging.extras import import_ndimage

LARGEST_LABEL = np.iinfo(np.uint16).max

Outcome = Literal["found", "empty", "missed", "invented"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of one label in one case.

    For predicted voxels P and true voxels L. A structure that neither has is an agreement: overlaps
    are 1, distances and differences 0. A structure that only one of the two has gets overlaps of 0
    and infinite distances, so that no mean leaves it out.

    Attributes:
      prediction_ml: volume of P in ml.
      label_ml: volume of L in ml.
      dice: 2 |P n L| / (|P| + |L|).
      iou: |P n L| / |P u L|.
      hd95: 95th percentile of the distances between the surfaces in mm, the larger of both
        directions.
      surface_dice: fraction of both surfaces within the tolerance of the other one.
      assd: average symmetric surface distance, the mean over the voxels of both surfaces, in mm.
    """

    prediction_ml: float
    label_ml: float
    dice: float
    iou: float
    hd95: float
    surface_dice: float
    assd: float

    @classmethod
    def both_empty(cls) -> Self:
        """Makes the scores of a structure that neither prediction nor label has."""
        return cls(
            prediction_ml=0.0, label_ml=0.0, dice=1.0, iou=1.0, hd95=0.0, surface_dice=1.0, assd=0.0
        )

    @property
    def outcome(self) -> Outcome:
        """Says which of the two has the structure: both, neither, only the label or only P."""
        if self.label_ml > 0:
            return "found" if self.prediction_ml > 0 else "missed"
        return "invented" if self.prediction_ml > 0 else "empty"

    @property
    def volume_difference(self) -> float:
        """Volume of P minus that of L, in ml."""
        return self.prediction_ml - self.label_ml

    @property
    def relative_volume_difference(self) -> float:
        """Volume of P minus that of L, divided by that of L; infinite if only L is empty."""
        if self.label_ml == 0:
            return math.inf if self.prediction_ml > 0 else 0.0
        return self.volume_difference / self.label_ml


class Metric(NamedTuple):
    """A number that each label of each case gets.

    Attributes:
      name: attribute of `Scores` that holds it, and its name in files.
      title: heading in tables and plots.
      unit: unit, empty for fractions.
    """

    name: str
    title: str
    unit: str


METRICS = (
    Metric("dice", "Dice", ""),
    Metric("iou", "IoU", ""),
    Metric("surface_dice", "surface Dice", ""),
    Metric("hd95", "HD95", "mm"),
    Metric("assd", "ASSD", "mm"),
    Metric("volume_difference", "volume difference", "ml"),
    Metric("relative_volume_difference", "relative volume difference", ""),
)


def evaluate_case(
    prediction: np.ndarray,
    label: np.ndarray,
    spacing: Sequence[float],
    *,
    ids: Collection[int] | None = None,
    tolerance: float = 1.0,
    voxel_ml: float | None = None,
) -> dict[int, Scores]:
    """Scores each label of a predicted label map.

    Args:
      prediction: predicted class ids, integers [*spatial], 0 for the background.
      label: true class ids, with the shape of `prediction`.
      spacing: mm per voxel along each axis; distances take the axes to be perpendicular.
      ids: class ids to score; those that occur in either map, without the background, if None.
      tolerance: largest distance in mm that the surface Dice counts as agreement.
      voxel_ml: volume of a voxel in ml; that of perpendicular axes if None.

    Returns:
      The scores of each id, in ascending order.

    Raises:
      ValueError: if the shapes differ; if a map has other numbers than integers from 0 to 65535; if
        spacing or tolerance are no lengths.
      VolumeError: if scipy is not installed.
    """
    prediction, label = np.asarray(prediction), np.asarray(label)
    if prediction.shape != label.shape:
        raise ValueError(f"prediction: shape {prediction.shape}, must be the label's {label.shape}")
    if len(spacing) != label.ndim or not all(0 < mm < math.inf for mm in spacing):
        raise ValueError(f"spacing={spacing!r}: must be {label.ndim} lengths in mm")
    check_tolerance(tolerance)
    highest = max(_highest("prediction", prediction), _highest("label", label), *(ids or ()), 0)
    counts = DiceCounts.from_labels(prediction[None], label[None], highest + 1)
    dice = counts.per_case()[0]
    intersection, predicted, true = (
        field[0] for field in (counts.intersection, counts.prediction, counts.label)
    )
    union = predicted + true - intersection
    occurring = np.flatnonzero(union)
    find_objects = import_ndimage().find_objects
    boxes = find_objects(prediction), find_objects(label)
    ml = math.prod(spacing) / 1000 if voxel_ml is None else voxel_ml
    scores = {}
    for i in sorted(set(occurring.tolist()) - {0} if ids is None else set(ids)):
        if not union[i]:
            scores[i] = Scores.both_empty()
            continue
        box = _union_box(*(found[i - 1] if i <= len(found) else None for found in boxes))
        distances = SurfaceDistances.from_masks(prediction[box] == i, label[box] == i, spacing)
        scores[i] = Scores(
            prediction_ml=float(predicted[i] * ml),
            label_ml=float(true[i] * ml),
            dice=float(dice[i]),
            iou=float(intersection[i] / union[i]),
            hd95=distances.hausdorff(95),
            surface_dice=distances.surface_dice(tolerance),
            assd=distances.average(),
        )
    return scores


def check_tolerance(tolerance: float) -> None:
    """Refuses a tolerance that is no distance.

    Raises:
      ValueError: if it is negative, infinite or nan.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance!r}: must be a distance in mm, 0 or more")


def _highest(name: str, classes: np.ndarray) -> int:
    """Checks the class ids of a map and returns the highest one."""
    if not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"{name}: {classes.dtype}, must be integers")
    lowest, highest = int(classes.min(initial=0)), int(classes.max(initial=0))
    if lowest < 0 or highest > LARGEST_LABEL:
        raise ValueError(f"{name}: labels {lowest} to {highest}, must be 0 to {LARGEST_LABEL}")
    return highest


def _union_box(*boxes: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """Returns the smallest box that holds those of the boxes that are not None."""
    given = [box for box in boxes if box is not None]
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*given, strict=True)
    )
