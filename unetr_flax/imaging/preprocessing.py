"""Preprocessing: what is done to a scan before the model sees it, and how it is undone."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np

from unetr_flax.imaging.intensity import (
    IntensityRule,
    is_number,
    rule_from_dict,
    rule_of_modality,
    rule_to_dict,
)
from unetr_flax.imaging.model_grid import ModelGrid, foreground_box
from unetr_flax.imaging.resampling import resampled_shape
from unetr_flax.imaging.volume import Volume

# A scan of more voxels, 8 GiB per channel, must not be made by resampling.
MOST_VOXELS = 2**31


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Everything that is done to a scan before a model sees it.

    In this order: the scan is read onto the canonical grid (`read_volume`), each channel is
    normalized by its rule, the foreground is cropped, and the box is resampled. Training,
    validation and inference of a model must use the same, so it is saved with the model.

    Attributes:
      modalities: name of each channel, such as "CT" or "T1".
      intensity: rule that normalizes each channel.
      labels: a different name for each class by its id, the background first; empty if unknown.
      orientation: where the axes X, Y, Z point: to the patient's right, anterior and superior.
      spacing: mm per voxel and axis to resample to; each scan keeps its own if None.
      crop_foreground: whether to crop to the box of all voxels that are above the lowest
        normalized intensity of their channel.

    Raises:
      ValueError: if a field has another type or value; the message is one line that names the
        field, the value and what is allowed.
    """

    modalities: tuple[str, ...]
    intensity: tuple[IntensityRule, ...]
    labels: tuple[str, ...] = ()
    orientation: Literal["RAS"] = "RAS"
    spacing: tuple[float, float, float] | None = None
    crop_foreground: bool = False

    def __post_init__(self):
        for name, kind, what in (
            ("modalities", str, "names"),
            ("labels", str, "names"),
            ("intensity", IntensityRule, "intensity rules"),
        ):
            object.__setattr__(self, name, _tuple_of(name, getattr(self, name), kind, what))
        repeated = [name for name in dict.fromkeys(self.labels) if self.labels.count(name) > 1]
        if repeated:
            raise ValueError(f"labels={self.labels!r}: must differ, {repeated[0]!r} is repeated")
        if not self.modalities:
            raise ValueError("modalities=(): must name at least one channel")
        if len(self.intensity) != len(self.modalities):
            raise ValueError(
                f"intensity={self.intensity!r}: must be {len(self.modalities)} rules, one for "
                "each of the modalities"
            )
        if self.orientation != "RAS":
            raise ValueError(f"orientation={self.orientation!r}: must be 'RAS'")
        if self.spacing is not None:
            fits = isinstance(self.spacing, list | tuple) and len(self.spacing) == 3
            if not fits or not all(is_number(mm) and mm > 0 for mm in self.spacing):
                raise ValueError(f"spacing={self.spacing!r}: must be None or 3 numbers above 0")
            object.__setattr__(self, "spacing", tuple(float(mm) for mm in self.spacing))
        if not isinstance(self.crop_foreground, bool):
            raise ValueError(f"crop_foreground={self.crop_foreground!r}: must be True or False")

    @classmethod
    def from_modalities(
        cls,
        modalities: Sequence[str],
        *,
        labels: Sequence[str] = (),
        spacing: tuple[float, float, float] | None = None,
        crop_foreground: bool = False,
    ) -> Self:
        """Builds the defaults for channels: "CT" is windowed, all else is normalized as MRI.

        The rules are `Window(-175, 250)` for channels named "CT", in whatever case, and
        `Percentiles(0.5, 99.5)` for all others.

        Args:
          modalities: name of each channel.
          labels: name of each class; empty if unknown.
          spacing: mm per voxel and axis to resample to; each scan keeps its own if None.
          crop_foreground: whether to crop to the foreground.

        Raises:
          ValueError: as for the constructor.
        """
        modalities = _tuple_of("modalities", modalities, str, "names")
        return cls(
            modalities,
            tuple(rule_of_modality(modality) for modality in modalities),
            labels=_tuple_of("labels", labels, str, "names"),
            spacing=spacing,
            crop_foreground=crop_foreground,
        )

    def apply(self, volume: Volume) -> tuple[np.ndarray, ModelGrid]:
        """Prepares a scan for the model.

        Args:
          volume: [X, Y, Z, C] on the canonical grid.

        Returns:
          The image on the model's grid, [X', Y', Z', C], float32; and the grid, which brings label
          maps along and takes label maps and logits back to [X, Y, Z].

        Raises:
          ValueError: if the scan has another number of channels, or its grid would be too large.
          VolumeError: if the scan must be resampled and scipy is not installed.
        """
        image = self.normalize(volume)
        grid = self.grid(image, volume.spacing)
        return grid.sample_image(image), grid

    def normalize(self, volume: Volume) -> np.ndarray:
        """Normalizes the intensities of a scan on its own grid: [X, Y, Z, C], float32.

        Raises:
          ValueError: if the scan has another number of channels.
        """
        channels = volume.array.shape[-1]
        if channels != len(self.modalities):
            raise ValueError(
                f"image: {channels} channels, must be {len(self.modalities)} "
                f"({', '.join(self.modalities)})"
            )
        image = np.empty(volume.array.shape, np.float32)
        for i, rule in enumerate(self.intensity):
            image[..., i] = rule.normalize(volume.array[..., i])
        return image

    def grid(self, image: np.ndarray, spacing: Sequence[float]) -> ModelGrid:
        """Computes the grid on which the model sees a scan.

        Args:
          image: the normalized scan, [X, Y, Z, C].
          spacing: mm per voxel of the scan.

        Raises:
          ValueError: if the grid would have more than `MOST_VOXELS` voxels.
        """
        start, size = (0, 0, 0), image.shape[:-1]
        if self.crop_foreground:
            start, size = foreground_box(image)
        if self.spacing is None:
            return ModelGrid(image.shape[:-1], start, size, size, tuple(spacing))
        shape = resampled_shape(size, spacing, self.spacing)
        if math.prod(shape) > MOST_VOXELS:
            raise ValueError(
                f"image: {' x '.join(map(str, size))} voxels of "
                f"{' x '.join(f'{mm:.4g}' for mm in spacing)} mm would become "
                f"{' x '.join(map(str, shape))} of {' x '.join(f'{mm:g}' for mm in self.spacing)} "
                f"mm, more than {MOST_VOXELS:,} voxels"
            )
        return ModelGrid(image.shape[:-1], start, size, shape, self.spacing)

    def to_dict(self) -> dict[str, Any]:
        """Converts to what JSON can hold."""
        return {
            "modalities": list(self.modalities),
            "intensity": [rule_to_dict(rule) for rule in self.intensity],
            "labels": list(self.labels),
            "orientation": self.orientation,
            "spacing": None if self.spacing is None else list(self.spacing),
            "crop_foreground": self.crop_foreground,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Builds from the result of `to_dict`.

        Raises:
          ValueError: if fields are missing, unknown or have bad values; the message is one line.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise ValueError(f"{values!r}: must be an object with the fields {fields}")
        if unknown := sorted(map(str, values.keys() - set(fields))):
            raise ValueError(f"unknown fields {unknown}: must be {fields}")
        if missing := sorted(set(fields) - values.keys()):
            raise ValueError(f"missing fields {missing}: must be {fields}")
        rules = _tuple_of("intensity", values["intensity"], object, "intensity rules")
        return cls(**{**values, "intensity": tuple(_rule(i, rule) for i, rule in enumerate(rules))})


def _rule(index: int, values: Any) -> IntensityRule:
    try:
        return rule_from_dict(values)
    except ValueError as error:
        raise ValueError(f"intensity[{index}]: {error}") from None


def _tuple_of(name: str, values: Any, kind: Any, what: str) -> tuple[Any, ...]:
    """Makes a tuple of a list or tuple whose items are of one kind."""
    if not isinstance(values, list | tuple) or not all(isinstance(item, kind) for item in values):
        raise ValueError(f"{name}={values!r}: must be a list of {what}")
    return tuple(values)
