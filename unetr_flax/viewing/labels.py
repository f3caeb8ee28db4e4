"""Label maps as the views see them: checked, with a name and a color for each class."""

import colorsys
from collections.abc import Mapping

import numpy as np

from unetr_flax.imaging.volume import Volume

LARGEST_LABEL = np.iinfo(np.uint16).max

# Colors of classes 1, 2, ... that stay apart from each other and from the grays of an image.
_FIRST_COLORS = (
    (230, 57, 70),
    (46, 196, 182),
    (255, 183, 3),
    (76, 132, 255),
    (155, 209, 60),
    (214, 90, 214),
    (255, 127, 46),
    (0, 180, 100),
    (130, 100, 230),
    (120, 214, 255),
    (170, 110, 50),
    (255, 140, 190),
)


def color_of(label: int) -> tuple[int, int, int]:
    """Returns the color of a class as red, green and blue from 0 to 255.

    A class has the same color in every case and every view.
    """
    index = label - 1
    if 0 <= index < len(_FIRST_COLORS):
        return _FIRST_COLORS[index]
    # Steps by the golden ratio keep any number of hues apart; brightness separates neighbors.
    hue = (label * 0.618034) % 1
    red, green, blue = colorsys.hsv_to_rgb(
        hue, (0.8, 0.5, 0.95)[label % 3], (1.0, 0.9, 0.75)[label % 3]
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def name_of(label: int, names: Mapping[int, str]) -> str:
    """Returns the name of a class as printable text on one line, "label 7" if it has none."""
    name = " ".join(names.get(label, "").split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name) or (
        f"label {label}"
    )


def check_labels(volume: Volume, labels: np.ndarray) -> None:
    """Checks that a label map fits a scan.

    Raises:
      ValueError: if the label map is not [X, Y, Z] of the scan, or if its values are not integers
        from 0 to 65535.
    """
    expected = volume.array.shape[:-1]
    if labels.shape != expected:
        raise ValueError(f"labels: shape {labels.shape}, must be the scan's {expected}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: {labels.dtype}, must be integers")
    if labels.size and not 0 <= labels.min() <= labels.max() <= LARGEST_LABEL:
        raise ValueError(f"labels: {labels.min()} to {labels.max()}, must be 0 to {LARGEST_LABEL}")
