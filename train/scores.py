"""The scores of a validation: Dice, HD95 and surface Dice of every case, on the case's own grid."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from train.data.dataset import Dataset
from train.data.targets import IGNORED
from unetr_flax.evaluation.dice import DiceCounts, DiceScores
from unetr_flax.evaluation.scores import Scores, evaluate_case

# Millimeters: distances up to this count as agreement of two surfaces.
TOLERANCE = 1.0
FIELDS = tuple(field.name for field in dataclasses.fields(Scores))
COUNTS = ("intersection", "prediction", "label")


class CaseScores(NamedTuple):
    """The scores of one case, as arrays that processes can exchange.

    Attributes:
      counts: numbers of voxels for the Dice, int64 [3, labels], background first, see `DiceCounts`.
      scores: all fields of `Scores` for each label of the foreground, float64 [labels - 1, fields].
    """

    counts: np.ndarray
    scores: np.ndarray


def judge(
    dataset: Dataset, prediction: np.ndarray, target: np.ndarray, spacing: Sequence[float]
) -> CaseScores:
    """Scores one case; voxels that are ignored in the target count nowhere.

    Args:
      dataset: says what the numbers mean.
      prediction: [X, Y, Z], integers as in a target, see `train.data.targets`.
      target: the target [X, Y, Z].
      spacing: mm per voxel along each axis.
    """
    ignored = target == IGNORED
    if ignored.any():
        prediction, target = np.where(ignored, 0, prediction), np.where(ignored, 0, target)
    ids = range(1, len(dataset.labels))
    if dataset.has_regions:
        found: dict[int, Scores] = {}
        counts = [_counts(prediction == 0, target == 0)]
        for i in ids:
            masks = [(codes >> (i - 1) & 1).astype(np.uint8) for codes in (prediction, target)]
            counts.append(_counts(masks[0], masks[1]))
            case = evaluate_case(masks[0], masks[1], spacing, ids=[1], tolerance=TOLERANCE)
            found[i] = case[1]
        rows = np.stack(counts, 1)
    else:
        number = len(dataset.labels)
        voxels = DiceCounts.from_labels(prediction[None], target[None], number)
        rows = np.stack([getattr(voxels, name)[0] for name in COUNTS])
        found = evaluate_case(prediction, target, spacing, ids=ids, tolerance=TOLERANCE)
    # Ignored voxels are background in both.
    rows[:, 0] -= np.count_nonzero(ignored)
    return CaseScores(rows, np.array([dataclasses.astuple(found[i]) for i in ids]))


def _counts(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    masks = (np.logical_and(prediction, target), prediction, target)
    return np.array([np.count_nonzero(mask) for mask in masks], np.int64)


@dataclasses.dataclass(frozen=True)
class Validation:
    """The scores of all validation cases.

    Attributes:
      dice: mean Dice over cases, see `DiceCounts.compute`.
      cases: the scores of each case by its name and the number of the label, from 1.
    """

    dice: DiceScores
    cases: Mapping[str, Mapping[int, Scores]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_cases(cls, names: Sequence[str], scores: Sequence[CaseScores]) -> Self:
        """Puts the scores of cases together."""
        counts = DiceCounts(*np.stack([case.counts for case in scores], 1))
        cases = {
            name: {i: Scores(*map(float, row)) for i, row in enumerate(case.scores, 1)}
            for name, case in zip(names, scores, strict=True)
        }
        return cls(counts.compute(), cases)

    @property
    def per_class(self) -> np.ndarray:
        """Mean Dice of each label, background first."""
        return self.dice.per_class

    @property
    def mean_foreground(self) -> float:
        """Mean Dice of the labels but the background."""
        return self.dice.mean_foreground

    def mean(self, metric: str, label: int) -> float:
        """Computes the mean of a metric over cases; nan if no case counts.

        A case counts if prediction or label has the structure, and for distances only if both
        have, since they are infinite otherwise.

        Args:
          metric: a field of `Scores`.
          label: number of the label, from 1.
        """
        rows = [case[label] for case in self.cases.values()]
        values = [getattr(row, metric) for row in rows if row.outcome != "empty"]
        finite = [x for x in values if math.isfinite(x)]
        return float(np.mean(finite)) if finite else math.nan

    def mean_over_labels(self, metric: str) -> float:
        """Computes the mean of `mean` over the labels for which it is not nan."""
        labels = sorted({i for case in self.cases.values() for i in case})
        means = [x for i in labels if not math.isnan(x := self.mean(metric, i))]
        return float(np.mean(means)) if means else math.nan

    def outcomes(self, label: int) -> dict[str, int]:
        """Counts the cases in which a label was found, missed, invented, or is empty in both."""
        outcomes = [case[label].outcome for case in self.cases.values()]
        return {name: outcomes.count(name) for name in ("found", "missed", "invented", "empty")}

    def worst_cases(self, number: int) -> list[str]:
        """Returns the names of the cases with the lowest mean Dice, the lowest first."""
        means = {
            name: np.mean([row.dice for row in case.values() if row.outcome != "empty"] or [1.0])
            for name, case in self.cases.items()
        }
        return sorted(means, key=lambda name: (means[name], name))[:number]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON types; numbers that are not finite are texts."""
        return {
            "dice": [_to_json(x) for x in self.per_class.tolist()],
            "mean_dice": _to_json(self.mean_foreground),
            "cases": {
                name: {
                    str(i): {k: _to_json(x) for k, x in dataclasses.asdict(row).items()}
                    for i, row in case.items()
                }
                for name, case in self.cases.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverts `to_dict`.

        Raises:
          ValueError: if the content is of another kind.
          KeyError: if something is missing.
        """
        dice = DiceScores(np.array([float(x) for x in values["dice"]]), float(values["mean_dice"]))
        cases = {
            name: {
                int(i): Scores(*(float(row[field]) for field in FIELDS)) for i, row in case.items()
            }
            for name, case in values["cases"].items()
        }
        return cls(dice, cases)


def _to_json(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)
