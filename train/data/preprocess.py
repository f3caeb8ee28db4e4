"""Cases as the arrays that a model is trained on."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from train.data.targets import IGNORED
from unetr_flax.imaging.intensity import Window, background
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


def make_preprocessing(
    modalities: Sequence[str],
    labels: Sequence[str],
    *,
    spacing: tuple[float, float, float] | None,
    window: tuple[float, float] | None = None,
    crop_foreground: bool = False,
) -> Preprocessing:
    """Builds the preprocessing of a run: that of its modalities, with the options of the run.

    Args:
      modalities: name of each channel.
      labels: name of each class, the background first.
      spacing: mm per voxel and axis to resample to; each scan keeps its own if None.
      window: lowest and highest intensity of channels named CT; the default window if None.
      crop_foreground: whether to crop to the foreground.

    Raises:
      ValueError: if a value cannot be, or there is no channel to apply the window to.
    """
    preprocessing = Preprocessing.from_modalities(
        modalities, labels=labels, spacing=spacing, crop_foreground=crop_foreground
    )
    if window is None:
        return preprocessing
    windowed = [isinstance(rule, Window) for rule in preprocessing.intensity]
    if not any(windowed):
        raise ValueError(f"--window: needs a channel named CT, there are {', '.join(modalities)}")
    rules = zip(windowed, preprocessing.intensity, strict=True)
    return dataclasses.replace(
        preprocessing, intensity=tuple(Window(*window) if is_ct else rule for is_ct, rule in rules)
    )
