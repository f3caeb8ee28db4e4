"""The Dice coefficient of label maps, as a state that is merged case by case and divided once."""

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import numpy as np
from jax.typing import ArrayLike


class DiceScores(NamedTuple):
    """Mean Dice over cases; nan where a class is absent from every case.

    Attributes:
      per_class: [K], one mean per class, background first.
      mean_foreground: mean of `per_class` without background and without absent classes.
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
    """Voxels per case and class, from which every Dice follows: three integer arrays [cases, K].

    Attributes:
      intersection: voxels where prediction and label are both of the class.
      prediction: voxels that are predicted to be of the class.
      label: voxels that are labeled with the class.
    """

    intersection: np.ndarray
    prediction: np.ndarray
    label: np.ndarray

    @classmethod
    def empty(cls, num_classes: int) -> Self:
        """No case yet: what merging starts from."""
        zeros = np.zeros((0, num_classes), np.int64)
        return cls(zeros, zeros, zeros)

    @classmethod
    def from_labels(cls, prediction: ArrayLike, label: ArrayLike, num_classes: int) -> Self:
        """Counts the voxels of a batch on the host, in 64-bit integers.

        Args:
          prediction: predicted class of each voxel, integers [B, *spatial] in [0, num_classes).
          label: true class of each voxel, like `prediction`.
          num_classes: K.

        Raises:
          ValueError: if the shapes differ, or values are not classes.
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
        confusion = np.zeros((len(label), num_classes, num_classes), np.int64)
        for i in range(len(label)):
            pairs = label[i].astype(np.int64) * num_classes + prediction[i].astype(np.int64)
            confusion[i] = np.bincount(pairs.ravel(), minlength=num_classes**2).reshape(
                num_classes, num_classes
            )
        return cls(
            intersection=confusion.diagonal(axis1=1, axis2=2),
            prediction=confusion.sum(1),
            label=confusion.sum(2),
        )

    def merge(self, other: Self) -> Self:
        """The cases of both, in order."""
        return jax.tree.map(lambda a, b: np.concatenate([a, b]), self, other)

    def per_case(self) -> np.ndarray:
        """Dice of each case and class, 2 |P n L| / (|P| + |L|), [cases, K].

        nan where the class is in neither the prediction nor the label, since 0/0 says nothing of
        the prediction; 0 where it is in one of them only.
        """
        size = self.prediction + self.label
        dice = np.full(size.shape, np.nan)
        return np.divide(2 * self.intersection, size, out=dice, where=size > 0)

    def compute(self) -> DiceScores:
        """Mean Dice over cases for each class, and the mean of the foreground classes.

        A class's mean is over the cases where it is present in label or prediction, as nnU-Net
        computes it (Isensee et al. 2021): a case without the class counts as 0 if any voxel of it
        is predicted, and is left out otherwise.
        """
        per_class = _mean_of_present(self.per_case())
        return DiceScores(per_class, float(_mean_of_present(per_class[1:])))


def _mean_of_present(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without nan; nan, and no warning, where nothing is left."""
    present = ~np.isnan(values)
    number = np.asarray(present.sum(0))
    total = np.where(present, values, 0).sum(0)
    return np.divide(total, number, out=np.full(number.shape, np.nan), where=number > 0)
