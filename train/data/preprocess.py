"""Cases as the arrays that a model is trained on."""

import dataclasses
import functools

import numpy as np

from train.data.targets import IGNORED
from unetr_flax.imaging.intensity import background
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.imaging.volume import Volume


@dataclasses.dataclass(frozen=True)
class Sample:
    """A preprocessed case.

    Attributes:
      name: name of the case.
      image: normalized intensities [X, Y, Z, C], float32.
      label: targets [X, Y, Z], signed integers, see `train.data.targets`.
      spacing: mm per voxel along each axis.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, ...]

    @functools.cached_property
    def foreground(self) -> np.ndarray:
        """Flat indices of the voxels that are neither background nor ignored."""
        return np.flatnonzero((self.label != 0) & (self.label != IGNORED))

    @functools.cached_property
    def background(self) -> np.ndarray:
        """Intensity of each channel outside the volume: the channel's lowest."""
        return background(self.image)


def make_sample(
    name: str, volume: Volume, targets: np.ndarray, preprocessing: Preprocessing
) -> Sample:
    """Preprocesses an image and brings its targets [X, Y, Z] along to the model's grid."""
    image, grid = preprocessing.apply(volume)
    return Sample(name, image, grid.sample_labels(targets), grid.spacing)
