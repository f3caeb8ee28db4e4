"""The Dice coefficient of label maps (Dice 1945), from counts that are merged case by case."""

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import numpy as np
from jax.typing import ArrayLike

# Voxels that are counted at once, as counting makes a copy of 8 bytes for each.
VOXELS_AT_ONCE = 2**20


class DiceScores(NamedTuple):
    """Mean Dice coefficients over cases.

    Attributes:
      per_class: [K], the mean of each class, background first; nan for a class that no case has.
      mean_foreground: mean of `per_class` without the background and without nan; nan if no
        foreground class is left.
    """

    per_class: np.ndarray
    mean_foreground: float


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["intersection", "prediction", "label"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DiceCounts:
    """Numbers of voxels per case and class, from which Dice coefficients are computed.

    Counts of different cases are merged, so no two label maps need to be in memory together. The
    class is a pytree of its three arrays.

    Attributes:
      intersection: [cases, K], int64, voxels where prediction and label are both the class.
      prediction: [cases, K], int64, voxels where the prediction is the class.
      label: [cases, K], int64, voxels where the label is the class.
    """

    intersection: np.ndarray
    prediction: np.ndarray
    label: np.ndarray

    @classmethod
    def empty(cls, num_classes: int) -> Self:
        """Makes counts of no cases, to which those of cases can be merged."""
        zeros = np.zeros((0, num_classes), np.int64)
        return cls(zeros, zeros, zeros)

    @classmethod
    def from_labels(cls, prediction: ArrayLike, label: ArrayLike, num_classes: int) -> Self:
        """Counts the voxels of a batch on the host.

        Args:
          prediction: predicted class of each voxel, integers [B, *spatial] in [0, num_classes).
          label: true class of each voxel, with the shape and range of `prediction`.
          num_classes: number of classes K, with the background.

        Returns:
          Counts of B cases.

        Raises:
          ValueError: if the shapes differ, or if values are not integers in [0, num_classes).
        """
        prediction, label = np.asarray(prediction), np.asarray(label)
        if prediction.shape != label.shape or label.ndim < 2:
            raise ValueError(
                f"prediction: shape {prediction.shape}, must be [B, *spatial] as the label's, "
                f"which is {label.shape}"
            )
        for name, classes in (("prediction", prediction), ("label", label)):
            if not np.issubdtype(classes.dtype, np.integer):
                raise ValueError(f"{name}: {classes.dtype}, must be integers")
            if classes.size and not 0 <= classes.min() <= classes.max() < num_classes:
                raise ValueError(
                    f"{name}: classes from {classes.min()} to {classes.max()}, must be in "
                    f"[0, {num_classes})"
                )
        return cls(
            intersection=_count(label, num_classes, where=prediction == label),
            prediction=_count(prediction, num_classes),
            label=_count(label, num_classes),
        )

    def merge(self, other: Self) -> Self:
        """Appends the cases of other counts to those of this one."""
        return jax.tree.map(lambda a, b: np.concatenate([a, b]), self, other)

    def per_case(self) -> np.ndarray:
        """Computes the Dice coefficient of each case and class, [cases, K].

        For predicted voxels P and labeled voxels L of a class it is 2 |P n L| / (|P| + |L|): 0 if
        only one of the two has the class, and nan if neither has, as 0/0 does not judge the
        prediction.
        """
        size = self.prediction + self.label
        dice = np.full(size.shape, np.nan)
        return np.divide(2 * self.intersection, size, out=dice, where=size > 0)

    def compute(self) -> DiceScores:
        """Computes the mean Dice coefficient of each class over cases, and that of the foreground.

        The mean of a class is over the cases where label or prediction has the class, as nnU-Net
        computes it (Isensee et al. 2021): a case without the class counts as 0 if any of its
        voxels is predicted as the class, and is left out otherwise.
        """
        per_class = _mean_of_present(self.per_case())
        return DiceScores(per_class, float(_mean_of_present(per_class[1:])))


def _count(classes: np.ndarray, num_classes: int, where: np.ndarray | None = None) -> np.ndarray:
    """Counts the voxels of each case and class, [cases, K], int64, within `where` if given."""
    counts = np.zeros((len(classes), num_classes), np.int64)
    for i, case in enumerate(classes):
        flat = case.reshape(-1)
        mask = None if where is None else where[i].reshape(-1)
        for start in range(0, len(flat), VOXELS_AT_ONCE):
            piece = flat[start : start + VOXELS_AT_ONCE]
            if mask is not None:
                piece = piece[mask[start : start + VOXELS_AT_ONCE]]
            counts[i] += np.bincount(piece.astype(np.int64), minlength=num_classes)
    return counts


def _mean_of_present(values: np.ndarray) -> np.ndarray:
    """Computes the mean over the first axis without nan; where all are nan, it is nan."""
    present = ~np.isnan(values)
    number = np.asarray(present.sum(0))
    total = np.where(present, values, 0).sum(0)
    return np.divide(total, number, out=np.full(number.shape, np.nan), where=number > 0)
