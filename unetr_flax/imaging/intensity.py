"""Rules that turn a scanner's intensities into numbers of a common scale, one rule per channel."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Window:
    """Clips to a fixed window and scales it to [0, 1], for scanners with a calibrated unit.

    The default is soft tissue in Hounsfield units, as for the abdominal CT of the UNETR paper
    (Hatamizadeh et al. 2022, section 4.2) and in MONAI's tutorial.

    Attributes:
      low: intensity that becomes 0, and all below.
      high: intensity that becomes 1, and all above.

    Raises:
      ValueError: if the two are not finite numbers in ascending order.
    """

    low: float = -175.0
    high: float = 250.0

    def __post_init__(self):
        _check_range(self, -math.inf, math.inf, "finite numbers")

    def normalize(self, channel: np.ndarray) -> np.ndarray:
        """Normalizes one channel, an array of any shape; the result is float32."""
        clipped = np.clip(channel, self.low, self.high)
        return ((clipped - self.low) / (self.high - self.low)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """Clips to percentiles, then shifts and scales to mean 0 and standard deviation 1.

    Percentiles, mean and deviation are those of the nonzero voxels: MRI has no unit, and whatever
    lies outside the body is zero.

    Attributes:
      low: percentile of the nonzero voxels to which all below is raised.
      high: percentile of the nonzero voxels to which all above is lowered.

    Raises:
      ValueError: if the two are not numbers from 0 to 100 in ascending order.
    """

    low: float = 0.5
    high: float = 99.5

    def __post_init__(self):
        _check_range(self, 0, 100, "numbers from 0 to 100")

    def normalize(self, channel: np.ndarray) -> np.ndarray:
        """Normalizes one channel, an array of any shape; the result is float32."""
        body = channel[channel != 0]
        if not body.size:
            body = channel.ravel()
        low, high = np.percentile(body, (self.low, self.high))
        clipped = np.clip(body, low, high)
        deviation = clipped.std() or 1.0
        return ((np.clip(channel, low, high) - clipped.mean()) / deviation).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ZScore:
    """Shifts and scales to mean 0 and standard deviation 1 over all voxels."""

    def normalize(self, channel: np.ndarray) -> np.ndarray:
        """Normalizes one channel, an array of any shape; the result is float32."""
        # Sums of many float32 numbers lose digits.
        channel = channel.astype(np.float64)
        return ((channel - channel.mean()) / (channel.std() or 1.0)).astype(np.float32)


IntensityRule = Window | Percentiles | ZScore

# Names of the rules in files.
RULES: Mapping[str, type[IntensityRule]] = {
    "window": Window,
    "percentiles": Percentiles,
    "zscore": ZScore,
}


def rule_of_modality(modality: str) -> IntensityRule:
    """Chooses the default rule of a modality: the window for "CT", percentiles for all others."""
    return Window() if modality.strip().upper() == "CT" else Percentiles()


def background(image: np.ndarray) -> np.ndarray:
    """Finds the lowest intensity of each channel of an image [*spatial, C].

    What lies outside a scan is given this intensity, as air is the darkest in CT and MRI.
    """
    return image.min(axis=tuple(range(image.ndim - 1)))


def rule_to_dict(rule: IntensityRule) -> dict[str, Any]:
    """Converts a rule to what JSON can hold: its name as "rule", and its fields."""
    name = next(name for name, kind in RULES.items() if type(rule) is kind)
    return {"rule": name, **dataclasses.asdict(rule)}


def rule_from_dict(values: Any) -> IntensityRule:
    """Builds a rule from the result of `rule_to_dict`.

    Raises:
      ValueError: if the rule is unknown, or fields are missing, unknown or have bad values.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{values!r}: must be an object with a rule and its fields")
    name = values.get("rule")
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"rule={name!r}: must be one of {', '.join(map(repr, RULES))}")
    kind = RULES[name]
    fields = ["rule", *(field.name for field in dataclasses.fields(kind))]
    if values.keys() != set(fields):
        raise ValueError(f"fields {list(values)}: must be {fields} for rule {name!r}")
    return kind(**{field: values[field] for field in fields[1:]})


def is_number(value: Any) -> bool:
    """Tells whether a value is a finite real number; True and False are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    # Integers may be too large for math.isfinite, and compare exactly.
    return bool(abs(value) <= sys.float_info.max)


def _check_range(rule: Window | Percentiles, lowest: float, highest: float, allowed: str) -> None:
    """Raises if low and high are not ascending numbers of a range; makes floats of both."""
    for name in ("low", "high"):
        value = getattr(rule, name)
        if not is_number(value) or not lowest <= value <= highest:
            raise ValueError(f"{name}={value!r}: low and high must be {allowed}")
        object.__setattr__(rule, name, float(value))
    if not rule.low < rule.high:
        raise ValueError(f"low={rule.low!r}: must be below high={rule.high!r}")
