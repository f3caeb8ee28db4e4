"""A case on disk as the arrays that the model is trained on."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from train.data.decathlon import Case
from unetr_flax.imaging.nifti import normalize_ct, normalize_mri, read_labels, read_volume


@dataclasses.dataclass(frozen=True)
class Sample:
    """A preprocessed case.

    Attributes:
      name: of the case.
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
        """The lowest intensity of each channel: what lies outside the volume."""
        return self.image.min(axis=tuple(range(self.image.ndim - 1)))


def load_case(
    case: Case, modalities: Sequence[str], spacing: Sequence[float] | None = None
) -> Sample:
    """Reads a case onto the canonical grid and normalizes it.

    CT (by its modality's name) is windowed, everything else normalized by its own statistics.

    Args:
      case: which case.
      modalities: name of each channel.
      spacing: mm per voxel to resample to, image linearly and labels to the nearest; the case's
        own if None.

    Raises:
      VolumeError: if a file cannot be read.
    """
    volume = read_volume(case.image)
    label, _ = read_labels(case.label)
    image = np.concatenate(
        [
            normalize_ct(volume.array[..., i : i + 1])
            if modality.strip().upper() == "CT"
            else normalize_mri(volume.array[..., i : i + 1])
            for i, modality in enumerate(modalities)
        ],
        axis=-1,
    )
    if spacing is None:
        return Sample(case.name, image, label, volume.spacing)
    size = [
        max(1, round(n * old / new))
        for n, old, new in zip(label.shape, volume.spacing, spacing, strict=True)
    ]
    zoom = [new / old for new, old in zip(size, label.shape, strict=True)]
    resize = {"mode": "nearest", "grid_mode": True}
    image = np.stack(
        [ndimage.zoom(image[..., i], zoom, order=1, **resize) for i in range(image.shape[-1])], -1
    )
    label = ndimage.zoom(label, zoom, order=0, **resize)
    return Sample(case.name, image, label, tuple(float(s) for s in spacing))
