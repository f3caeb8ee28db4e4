"""Pictures of a prediction beside the true labels. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from unetr_flax.evaluation.drawing import label_color, make_figure, to_png
from unetr_flax.viewing.planes import PLANES, Plane

ROWS = ("Label", "Prediction", "Difference")
# Colors of voxels that only the label has, that only the prediction has, and of another label.
DIFFERENCES = (
    ("missing", (0.1, 0.3, 1.0)),
    ("too much", (1.0, 0.1, 0.75)),
    ("wrong label", (0.7, 1.0, 0.0)),
)
ROW_INCHES = 2.4
LEGEND_INCHES = 0.22


class Comparison(NamedTuple):
    """What is shown of a case, on the canonical grid.

    Attributes:
      title: heading of the picture.
      prediction: predicted class ids [X, Y, Z].
      label: true class ids [X, Y, Z].
      spacing: mm per voxel along each axis.
      image: intensities of the scan [X, Y, Z]; None if it is not known.
    """

    title: str
    prediction: np.ndarray
    label: np.ndarray
    spacing: Sequence[float]
    image: np.ndarray | None = None


def draw_comparison(case: Comparison, names: Mapping[int, str]) -> bytes:
    """Draws label, prediction and their difference in three planes, as the content of a PNG file.

    Each slice is the one with the most voxels that differ; with the most labeled ones if none does.
    Slices are seen in radiological convention, the patient's right on the left, voxels in their
    physical proportions. The gray window spans the 1st to 99th percentile of the slice.

    Args:
      case: what is shown.
      names: names of the labels that get a color, by id.
    """
    prediction, label = (
        np.where(np.isin(classes, list(names)), classes, 0)
        for classes in (case.prediction, case.label)
    )
    colors = {i: label_color(i) for i in names}
    extent = [n * mm for n, mm in zip(label.shape, case.spacing, strict=True)]
    proportions = [
        float(np.clip(extent[plane.across] / extent[plane.down], 0.5, 2.5)) for plane in PLANES
    ]
    places = [_place(prediction, label, plane) for plane in PLANES]
    slices = [
        [plane.take(classes, place) for classes in (label, prediction)]
        for plane, place in zip(PLANES, places, strict=True)
    ]
    drawn = set().union(*(np.unique(one).tolist() for pair in slices for one in pair))
    entries = [(names[i], colors[i]) for i in names if i in drawn] + list(DIFFERENCES)
    width = ROW_INCHES * sum(proportions) + 0.5
    # A legend entry has its patch and gaps, and about 0.07 inches per letter of 8 points.
    columns = max(1, int(width / (0.6 + 0.07 * max(len(name) for name, _ in entries))))
    lines = -(-len(entries) // columns)
    figure = make_figure(width, ROW_INCHES * len(ROWS) + 0.5 + LEGEND_INCHES * lines)
    axes = figure.subplots(len(ROWS), len(PLANES), width_ratios=proportions)
    for k, (plane, place) in enumerate(zip(PLANES, places, strict=True)):
        image = None if case.image is None else plane.take(case.image, place)
        aspect = case.spacing[plane.down] / case.spacing[plane.across]
        _draw_column(axes[:, k], image, slices[k], aspect, colors)
        first = axes[0, k]
        first.set_title(f"{plane.name}, slice {place + 1}", fontsize=9)
        left, _, top, _ = plane.edges
        for x, y, letter in ((0.03, 0.5, left), (0.5, 0.94, top)):
            side = first.text(
                x, y, letter, transform=first.transAxes, color="white", fontsize=8, va="center"
            )
            side.set_path_effects([withStroke(linewidth=1.5, foreground="black")])
    for axis, name in zip(axes[:, 0], ROWS, strict=True):
        axis.set_ylabel(name, fontsize=9)
    figure.suptitle(case.title, fontsize=9)
    figure.legend(
        [Patch(color=color) for _, color in entries],
        [name for name, _ in entries],
        loc="outside lower center",
        ncols=min(len(entries), columns),
        fontsize=8,
        frameon=False,
    )
    return to_png(figure)


def _place(prediction: np.ndarray, label: np.ndarray, plane: Plane) -> int:
    """Finds the slice to show, the middle one if there is no label."""
    others = tuple(axis for axis in range(3) if axis != plane.normal)
    for voxels in (prediction != label, label != 0):
        area = np.count_nonzero(voxels, axis=others)
        if area.any():
            return int(area.argmax())
    return label.shape[plane.normal] // 2


def _draw_column(
    panels,
    image: np.ndarray | None,
    slices: Sequence[np.ndarray],
    aspect: float,
    colors: Mapping[int, tuple[float, ...]],
) -> None:
    """Draws label, prediction and difference of one slice, one below the other."""
    label, prediction = slices
    ids = np.array([0, *colors])
    palette = ListedColormap([(0, 0, 0), *colors.values()])
    differing = np.select([prediction == label, prediction == 0, label == 0], [0, 1, 2], default=3)
    differences = ListedColormap([(0, 0, 0), *(color for _, color in DIFFERENCES)])
    overlays = [
        (np.searchsorted(ids, label), palette),
        (np.searchsorted(ids, prediction), palette),
        (differing, differences),
    ]
    # Colors are full where there is no scan to shine through.
    alpha = 1.0 if image is None else 0.65
    if image is None:
        image = np.zeros(label.shape)
    low, high = np.percentile(image, [1, 99])
    placement = {"aspect": aspect, "interpolation": "nearest"}
    for panel, (overlay, cmap) in zip(panels, overlays, strict=True):
        panel.set(xticks=[], yticks=[])
        panel.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), **placement)
        norm = BoundaryNorm(np.arange(cmap.N + 1) - 0.5, cmap.N)
        overlay = np.ma.masked_equal(overlay, 0)
        panel.imshow(overlay, cmap=cmap, norm=norm, alpha=alpha, **placement)
