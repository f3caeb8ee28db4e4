"""Pictures of predictions beside the ground truth."""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

PANEL_INCHES = 2.2  # width of a column
ROW_NAME_INCHES = 0.25
TITLE_INCHES = 0.3
DPI = 150
ROW_NAMES = ("Image", "Ground truth", "Prediction")


class Column(NamedTuple):
    """One case to show, in RAS orientation: axes point right, anterior and superior.

    Attributes:
      name: title of the column.
      image: intensities [X, Y, Z].
      label: true classes, integers [X, Y, Z].
      prediction: predicted classes, integers [X, Y, Z].
      spacing: size of a voxel along X, Y and Z in mm.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    spacing: Sequence[float]


def save_predictions(
    path: str | os.PathLike, cases: Sequence[Column], class_names: Sequence[str]
) -> None:
    """Writes a PNG with the rows image, ground truth and prediction, and one column per case.

    Each column shows the axial slice with the most foreground of the label (of the prediction if
    the label has none, the middle one if neither has) in radiological convention: anterior up, the
    patient's right on the left, voxels in their physical proportions. The gray window spans the
    1st to 99th percentile of the slice.

    Args:
      path: the PNG to write; its folder must exist.
      cases: the columns, from left to right.
      class_names: names of the classes, background first; the legend shows the others.

    Raises:
      ValueError: if there is no case or class, or a case's shapes, spacing or classes do not fit.
    """
    if not cases:
        raise ValueError("cases: none given, must be at least one")
    if len(class_names) < 2:
        raise ValueError(f"class_names={class_names!r}: must be background and at least one more")
    for case in cases:
        _check(case, len(class_names))
    names = class_names[1:]
    colors = _colors(len(names))
    width = ROW_NAME_INCHES + len(cases) * PANEL_INCHES
    # A legend entry has its patch and gaps, and about 0.07 inches per letter of 8 points.
    legend_columns = max(1, int(width / (0.55 + 0.07 * max(map(len, names)))))
    legend_height = 0.15 + 0.18 * math.ceil(len(names) / legend_columns)
    panel_height = PANEL_INCHES * min(2.0, max(_proportion(case) for case in cases))
    height = len(ROW_NAMES) * panel_height + TITLE_INCHES + legend_height

    figure = Figure((width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ROW_NAMES), len(cases), squeeze=False)
    for column, case in zip(axes.T, cases, strict=True):
        _draw_column(column, case, colors)
        column[0].set_title(case.name, fontsize=9, parse_math=False)
    for row, name in zip(axes[:, 0], ROW_NAMES, strict=True):
        row.set_ylabel(name, fontsize=9)
    legend = figure.legend(
        [Patch(color=color) for color in colors],
        names,
        loc="outside lower center",
        ncols=min(len(names), legend_columns),
        fontsize=8,
        frameon=False,
    )
    # Names are shown as they are, even with dollar signs.
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, format="png")


def _colors(number: int) -> list[tuple[float, float, float]]:
    """Chooses distinct colors, which repeat after 18; no grays, the colors of the image."""
    colormaps: Any = matplotlib.colormaps
    palette = colormaps["tab10" if number <= 9 else "tab20"].colors
    palette = [color for color in palette if len(set(color)) > 1]
    return [palette[i % len(palette)] for i in range(number)]


def _proportion(case: Column) -> float:
    """Returns the height of the case's axial slices divided by their width."""
    (x, y, _), (dx, dy, _) = case.image.shape, case.spacing
    return (y * dy) / (x * dx)


def _draw_column(panels, case: Column, colors: Sequence[tuple[float, ...]]) -> None:
    z = _slice_to_show(case)
    image, label, prediction = (
        axial_view(volume[..., z]) for volume in (case.image, case.label, case.prediction)
    )
    low, high = np.percentile(image, [1, 99])
    placement = {"aspect": case.spacing[1] / case.spacing[0], "interpolation": "nearest"}
    classes = {
        "cmap": ListedColormap(colors),
        "norm": BoundaryNorm(np.arange(len(colors) + 1) + 0.5, len(colors)),
        "alpha": 0.65,
    }
    for panel, overlay in zip(panels, (None, label, prediction), strict=True):
        panel.set(xticks=[], yticks=[])
        panel.imshow(image, cmap="gray", vmin=low, vmax=high, **placement)
        if overlay is not None:
            panel.imshow(np.ma.masked_equal(overlay, 0), **classes, **placement)
    side = panels[0].text(
        0.03, 0.5, "R", transform=panels[0].transAxes, color="white", fontsize=8, va="center"
    )
    side.set_path_effects([withStroke(linewidth=1.5, foreground="black")])


def axial_view(plane: np.ndarray) -> np.ndarray:
    """Turns an axial slice [X, Y] in RAS into [rows, columns]: anterior up, right on the left."""
    return plane[::-1, ::-1].T


def _slice_to_show(case: Column) -> int:
    """Finds the axial slice with the most foreground."""
    for classes in (case.label, case.prediction):
        area = np.count_nonzero(classes, axis=(0, 1))
        if area.any():
            return int(area.argmax())
    return case.image.shape[2] // 2


def _check(case: Column, num_classes: int) -> None:
    shape = case.image.shape
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"{case.name}: image has shape {shape}, must be [X, Y, Z]")
    if len(case.spacing) != 3 or not all(s > 0 for s in case.spacing):
        raise ValueError(f"{case.name}: spacing={case.spacing!r}, must be three positive numbers")
    for name, classes in (("label", case.label), ("prediction", case.prediction)):
        if classes.shape != shape:
            raise ValueError(
                f"{case.name}: {name} has shape {classes.shape}, must be the image's {shape}"
            )
        if not 0 <= classes.min() <= classes.max() < num_classes:
            raise ValueError(
                f"{case.name}: {name} has classes from {classes.min()} to {classes.max()}, must "
                f"be in [0, {num_classes})"
            )
