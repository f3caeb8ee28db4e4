"""The fingerprint of a data set: what a plan for its training depends on (Isensee et al. 2021)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.data.cases import read_case
from train.data.dataset import BadCasesError, Case, Dataset
from train.data.targets import IGNORED, count_labels
from unetr_flax.imaging.intensity import IntensityRule, Window, rule_of_modality

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
      outlines: of each measured case, [1 + X + Y + Z, C]: the lowest intensity of each channel, and
        the highest ones of each plane across each axis. Channels that a window normalizes have the
        intensities of their files, so that the window may be chosen later; others are normalized.
      low: the 0.5th percentile of the intensities of labeled voxels, for each channel.
      high: their 99.5th percentile, for each channel.
      label_fractions: share of the measured voxels that each label has.
    """

    num_train: int
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    shapes: np.ndarray
    spacings: np.ndarray
    outlines: tuple[np.ndarray, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    label_fractions: tuple[float, ...]

    @property
    def windowed(self) -> list[bool]:
        """Whether a window normalizes each channel."""
        return [isinstance(rule_of_modality(name), Window) for name in self.modalities]

    def boxes(self, window: tuple[float, float] | None) -> np.ndarray:
        """Computes the voxels per axis that cropping to the foreground leaves, [cases, 3].

        Args:
          window: lowest and highest intensity of channels named CT; the default window if None.
        """
        rule = Window() if window is None else Window(*window)
        boxes = []
        for outline, shape in zip(self.outlines, self.shapes, strict=True):
            # The order of intensities stays as it is, so what is highest needs no other voxels.
            lowest, *highest = np.where(self.windowed, rule.normalize(outline), outline)
            inside = (np.array(highest) > lowest).any(-1)
            boxes.append([_extent(axis) for axis in np.split(inside, np.cumsum(shape)[:-1])])
        return np.array(boxes)

    def filled(self, window: tuple[float, float] | None) -> float:
        """Computes the share of the median case that the box of its foreground fills."""
        return float(np.median(self.boxes(window).prod(axis=1) / self.shapes.prod(axis=1)))


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
    shapes, spacings, outlines, intensities, counts = zip(*measured, strict=True)
    low, high = np.percentile(np.concatenate(intensities), (0.5, 99.5), axis=0)
    counts = np.sum(counts, axis=0)
    return Fingerprint(
        num_train,
        dataset.modalities,
        dataset.labels,
        np.array(shapes),
        np.array(spacings),
        outlines,
        tuple(low.tolist()),
        tuple(high.tolist()),
        tuple((counts / sum(np.prod(shape) for shape in shapes)).tolist()),
    )


def _measure(
    dataset: Dataset, case: Case
) -> tuple[Sequence[int], Sequence[float], np.ndarray, np.ndarray, list[int]]:
    """Returns shape, spacing, outline, intensities and counts of labels."""
    volume, targets = read_case(dataset, case)
    labeled = volume.array[(targets != 0) & (targets != IGNORED)]
    if not len(labeled):
        labeled = volume.array.reshape(-1, volume.array.shape[-1])
    # Every n-th voxel, so that a fingerprint is the same every time.
    intensities = labeled[:: max(1, len(labeled) // VOXELS_PER_CASE)].astype(np.float64)
    outline = np.stack(
        [
            _outline(volume.array[..., i], rule_of_modality(modality))
            for i, modality in enumerate(dataset.modalities)
        ],
        axis=-1,
    )
    return targets.shape, volume.spacing, outline, intensities, count_labels(dataset, targets)


def _outline(channel: np.ndarray, rule: IntensityRule) -> np.ndarray:
    """Returns the lowest intensity, and the highest ones of each plane across each axis."""
    if not isinstance(rule, Window):
        channel = rule.normalize(channel)
    planes = [channel.max((1, 2)), channel.max((0, 2)), channel.max((0, 1))]
    return np.concatenate([channel.min(keepdims=True).ravel(), *planes])


def _extent(inside: np.ndarray) -> int:
    """Counts from the first plane that is inside to the last; all planes if none is."""
    indices = np.flatnonzero(inside)
    return int(indices[-1] - indices[0]) + 1 if indices.size else inside.size
