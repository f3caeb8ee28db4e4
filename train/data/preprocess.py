"""Cases on disk as the arrays that the model is trained on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from train.data.cases import read_cases
from train.data.dataset import Case, Dataset
from train.distributed import is_main, run_on_main
from unetr_flax import Preprocessing
from unetr_flax.imaging.intensity import background
from unetr_flax.imaging.volume import Volume


@dataclasses.dataclass(frozen=True)
class Sample:
    """A preprocessed case.

    Attributes:
      name: name of the case.
      image: normalized intensities [X, Y, Z, C], float32.
      label: class ids [X, Y, Z], int32.
      spacing: mm per voxel along each axis.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, ...]

    @functools.cached_property
    def foreground(self) -> np.ndarray:
        """Flat indices of the voxels that are not background."""
        return np.flatnonzero(self.label)

    @functools.cached_property
    def background(self) -> np.ndarray:
        """Intensity of each channel outside the volume: the channel's lowest."""
        return background(self.image)


def read_samples(
    dataset: Dataset,
    train_cases: Sequence[Case],
    preprocessing: Preprocessing,
    progress: Callable[[int], None] | None = None,
) -> list[Sample]:
    """Checks every case of a data set, and keeps the preprocessed training cases.

    Every file is read once: a training case becomes a sample from the read that checks it, a
    validation case is let go. The main process checks all cases while the others wait, which then
    read their training cases; where the check fails, all processes fail.

    Args:
      dataset: the data set.
      train_cases: which of its cases to keep.
      preprocessing: preparation of the images for the model.
      progress: called with the number of cases done so far.

    Returns:
      The samples, in the order of the cases in the data set.

    Raises:
      BadCasesError: naming all files that cannot be trained on, one line each.
      train.distributed.MainProcessError: on the other processes, if the check failed.
    """
    samples = []
    kept = set(train_cases)

    def use(case: Case, volume: Volume, labels: np.ndarray) -> Sample | None:
        return make_sample(case.name, volume, labels, preprocessing) if case in kept else None

    def read(cases: Sequence[Case]) -> None:
        results = read_cases(dataset, cases, use, progress)
        samples.extend(sample for sample in results if sample is not None)

    run_on_main(lambda: read(dataset.cases))
    if not is_main():
        read(train_cases)
    return samples


def make_sample(
    name: str, volume: Volume, labels: np.ndarray, preprocessing: Preprocessing
) -> Sample:
    """Preprocesses an image and brings its class ids [X, Y, Z] along to the model's grid."""
    image, grid = preprocessing.apply(volume)
    return Sample(name, image, grid.sample_labels(labels), grid.spacing)
