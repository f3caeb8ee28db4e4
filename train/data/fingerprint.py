"""The fingerprint of a data set: what a plan for its training depends on (Isensee et al. 2021)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.data.cases import read_case
from train.data.dataset import BadCasesError, Case, Dataset
from train.data.targets import IGNORED, count_labels
from unetr_flax.imaging.model_grid import foreground_box

# More cases tell hardly more, and reading large ones takes seconds each.
MOST_CASES = 40
# Voxels of the foreground whose intensities are taken from each case.
VOXELS_PER_CASE = 10_000


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Measurements of some of the cases.

    Attributes:
      num_train: number of cases of the whole data set that are trained on.
      modalities: name of each channel.
      labels: name of the background and of each class or region.
      shapes: voxels of each measured case per axis, [cases, 3].
      spacings: mm per voxel of each measured case per axis, [cases, 3].
      boxes: voxels of the box of each measured case's foreground per axis, [cases, 3], where the
        foreground is what is above the lowest intensity.
      low: the 0.5th percentile of the intensities of labeled voxels, for each channel.
      high: their 99.5th percentile, for each channel.
      label_fractions: share of the measured voxels that each label has.
    """

    num_train: int
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    shapes: np.ndarray
    spacings: np.ndarray
    boxes: np.ndarray
    low: tuple[float, ...]
    high: tuple[float, ...]
    label_fractions: tuple[float, ...]

    @property
    def filled(self) -> float:
        """Share of the median case that the box of its foreground fills."""
        return float(np.median(self.boxes.prod(axis=1) / self.shapes.prod(axis=1)))


def take_fingerprint(dataset: Dataset, num_train: int) -> Fingerprint | None:
    """Measures up to `MOST_CASES` cases from all over a data set.

    Cases that cannot be read are left out, since `read_cases` will tell all that is wrong with
    them.

    Args:
      dataset: the data set.
      num_train: number of its cases that are trained on.

    Returns:
      The fingerprint; None if no case can be read.
    """
    places = np.linspace(0, len(dataset.cases) - 1, min(MOST_CASES, len(dataset.cases)))
    measured = []
    for place in places.round().astype(int):
        try:
            measured.append(_measure(dataset, dataset.cases[place]))
        except BadCasesError:
            continue
    if not measured:
        return None
    shapes, spacings, boxes, intensities, counts = zip(*measured, strict=True)
    low, high = np.percentile(np.concatenate(intensities), (0.5, 99.5), axis=0)
    counts = np.sum(counts, axis=0)
    return Fingerprint(
        num_train,
        dataset.modalities,
        dataset.labels,
        np.array(shapes),
        np.array(spacings),
        np.array(boxes),
        tuple(low.tolist()),
        tuple(high.tolist()),
        tuple((counts / sum(np.prod(shape) for shape in shapes)).tolist()),
    )


def _measure(
    dataset: Dataset, case: Case
) -> tuple[Sequence[int], Sequence[float], Sequence[int], np.ndarray, list[int]]:
    """Returns shape, spacing, box of the foreground, intensities and counts of labels."""
    volume, targets = read_case(dataset, case)
    _, box = foreground_box(volume.array)
    labeled = volume.array[(targets != 0) & (targets != IGNORED)]
    if not len(labeled):
        labeled = volume.array.reshape(-1, volume.array.shape[-1])
    # Every n-th voxel, so that a fingerprint is the same every time.
    intensities = labeled[:: max(1, len(labeled) // VOXELS_PER_CASE)].astype(np.float64)
    return targets.shape, volume.spacing, box, intensities, count_labels(dataset, targets)
