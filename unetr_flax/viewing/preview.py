"""A picture of a segmentation: three planes with the image, the labels and their outlines."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unetr_flax.imaging.volume import Volume, VolumeError
from unetr_flax.runtime.atomic import commit, staged
from unetr_flax.viewing.cross_sections import CrossSections
from unetr_flax.viewing.labels import check_labels, color_of, name_of
from unetr_flax.viewing.planes import CONVENTION, PLANES, Plane
from unetr_flax.viewing.windows import window_presets

# Inches, but for DPI.
DPI = 150
PANELS_WIDTH = 10.0
LARGEST_ROW_HEIGHT = 5.0
GAP = 0.12
TITLE_HEIGHT = 0.62
FOOT_HEIGHT = 0.34
ENTRY_HEIGHT = 0.21
ENTRY_WIDTH = 2.4
LARGEST_LEGEND_COLUMNS = 3

BACKGROUND, TEXT, FAINT = "#14171c", "#f2f2f2", "#aab2bd"
FILL_OPACITY = 0.4
LONGEST_NAME = 24
FONT = "DejaVu Sans"  # comes with matplotlib


def write_preview(
    path: Path,
    volume: Volume,
    labels: np.ndarray,
    names: Mapping[int, str],
    *,
    window: tuple[float, float] | None,
) -> None:
    """Writes a PNG of three planes, each through the slice with the most labeled voxels.

    The upper row has the image, the lower one also the labels as filled areas with outlines. All
    panels have one scale in mm. A legend names the classes and their volumes, letters at the edges
    name the directions, and the picture says so if there are no labels. Of an image with several
    channels the first is shown.

    Args:
      path: the PNG to write, whole or not at all; its folder must exist.
      volume: the scan, [X, Y, Z, C] on the canonical grid.
      labels: class ids [X, Y, Z] on the same grid, 0 is the background.
      names: names of classes by id.
      window: lowest and highest intensity of a CT, from black to white; None for images without a
        unit, shown from the 1st to the 99th percentile of their nonzero voxels.

    Raises:
      ValueError: if the label map does not fit the scan.
      VolumeError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    check_labels(volume, labels)
    figure = _draw(volume, labels, names, window)
    with staged(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=BACKGROUND)
        commit(temporary, path)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where things are in the picture, in inches from its lower left corner.

    Attributes:
      scale: inches per mm of the scan.
      row_height: height of each of the two rows of panels.
      lefts: left edge of each column.
      widths: width of each column.
      legend_columns: columns of the legend, right of the panels.
      legend_entries: entries of the legend that fit into one column.
    """

    scale: float
    row_height: float
    lefts: tuple[float, ...]
    widths: tuple[float, ...]
    legend_columns: int
    legend_entries: int

    @classmethod
    def of(cls, extent: np.ndarray, classes: int) -> "_Layout":
        """Plans for a scan of some extent [3] in mm and a number of classes."""
        mm = [float(extent[plane.across]) for plane in PLANES]
        tallest = max(float(extent[plane.down]) for plane in PLANES)
        scale = min(PANELS_WIDTH / sum(mm), LARGEST_ROW_HEIGHT / tallest)
        # Narrow panels leave room for the titles above them.
        widths = [max(length * scale, 1.3) for length in mm]
        lefts = [GAP + sum(widths[:i]) + i * GAP for i in range(3)]
        row_height = tallest * scale
        entries = max(1, int((2 * row_height + GAP) / ENTRY_HEIGHT))
        columns = min(LARGEST_LEGEND_COLUMNS, max(1, -(-classes // entries)))
        return cls(scale, row_height, tuple(lefts), tuple(widths), columns, entries)

    @property
    def legend_left(self) -> float:
        return self.lefts[-1] + self.widths[-1] + 2 * GAP

    @property
    def size(self) -> tuple[float, float]:
        width = self.legend_left + self.legend_columns * ENTRY_WIDTH
        return width, FOOT_HEIGHT + 2 * self.row_height + GAP + TITLE_HEIGHT


def _draw(
    volume: Volume, labels: np.ndarray, names: Mapping[int, str], window: tuple[float, float] | None
) -> Any:
    sections = CrossSections.of(labels)
    ml = sections.voxels * volume.voxel_ml
    image = volume.array[..., 0]
    (low, high), *_ = window_presets(image, window).values()
    extent = np.array(labels.shape) * volume.spacing
    layout = _Layout.of(extent, len(sections.ids))
    width, height = layout.size
    figure = _import("matplotlib.figure").Figure(layout.size, dpi=DPI)
    # The canvas draws without a screen.
    _import("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    for column, plane in enumerate(PLANES):
        index = sections.largest_of_all[plane.normal]
        across, down = extent[plane.across], extent[plane.down]
        wide, tall = across * layout.scale, down * layout.scale
        left = layout.lefts[column] + (layout.widths[column] - wide) / 2
        for row in range(2):
            bottom = FOOT_HEIGHT + (1 - row) * (layout.row_height + GAP)
            bottom += (layout.row_height - tall) / 2
            panel = figure.add_axes(
                (left / width, bottom / height, wide / width, tall / height), facecolor="black"
            )
            panel.set(xticks=[], yticks=[], xlim=(0, across), ylim=(down, 0))
            area = (0, across, down, 0)
            panel.imshow(
                plane.take(image, index),
                cmap="gray",
                vmin=low,
                vmax=high,
                extent=area,
                aspect="auto",
                interpolation="bilinear",
            )
            if row:
                _draw_labels(panel, plane.take(labels, index), area)
            _draw_edges(panel, plane)
        middle = (layout.lefts[column] + layout.widths[column] / 2) / width
        title = f"{plane.name}\nslice {index + 1} of {labels.shape[plane.normal]}"
        y = 1 - (TITLE_HEIGHT - 0.1) / height
        figure.text(middle, y, title, color=TEXT, fontsize=9, ha="center", va="bottom")
    _draw_legend(figure, layout, dict(zip(sections.ids, ml.tolist(), strict=True)), names)
    foot = f"{CONVENTION} Window {low:.5g} to {high:.5g}."
    if volume.array.shape[-1] > 1:
        foot += f" Channel 1 of {volume.array.shape[-1]}."
    figure.text(GAP / width, 0.12 / height, foot, color=FAINT, fontsize=7.5, va="bottom")
    return figure


def _draw_labels(panel: Any, classes: np.ndarray, area: tuple[float, ...]) -> None:
    """Draws the labels of one slice [rows, columns] as filled areas and outlines."""
    present = [int(label) for label in np.unique(classes) if label]
    colors = np.zeros((max(present, default=0) + 1, 4))
    for label in present:
        colors[label] = (*(value / 255 for value in color_of(label)), FILL_OPACITY)
    panel.imshow(colors[classes], extent=area, aspect="auto", interpolation="nearest")
    _, across, down, _ = area
    rows, columns = classes.shape
    # A border of background closes the outlines of structures that the scan cuts off.
    x = (np.arange(-1, columns + 1) + 0.5) * across / columns
    y = (np.arange(-1, rows + 1) + 0.5) * down / rows
    for label in present:
        mask = np.pad(classes == label, 1).astype(np.float32)
        panel.contour(x, y, mask, [0.5], colors=[colors[label, :3]], linewidths=1.0)


def _draw_edges(panel: Any, plane: Plane) -> None:
    """Writes the letters of the directions inside the edges of a panel."""
    left, right, top, bottom = plane.edges
    stroke = _import("matplotlib.patheffects").withStroke(linewidth=1.5, foreground="black")
    for letter, x, y, ha, va in (
        (left, 0, 0.5, "left", "center"),
        (right, 1, 0.5, "right", "center"),
        (top, 0.5, 1, "center", "top"),
        (bottom, 0.5, 0, "center", "bottom"),
    ):
        panel.annotate(
            letter,
            (x, y),
            ((0.5 - x) * 8, (0.5 - y) * 6),
            xycoords="axes fraction",
            textcoords="offset points",
            color=TEXT,
            fontsize=8,
            ha=ha,
            va=va,
            path_effects=[stroke],
        )


def _draw_legend(
    figure: Any, layout: _Layout, volumes_ml: Mapping[int, float], names: Mapping[int, str]
) -> None:
    """Draws a color, a name and a volume for each class, or says that there is none."""
    width, height = layout.size
    top = height - TITLE_HEIGHT
    if not volumes_ml:
        figure.text(
            layout.legend_left / width, top / height, "No labels found", color=TEXT, va="top"
        )
        return
    rectangle = _import("matplotlib.patches").Rectangle
    room = layout.legend_columns * layout.legend_entries
    shown = list(volumes_ml)[: room if len(volumes_ml) <= room else room - 1]
    lines = [(_drawable(name_of(k, names)), f"{volumes_ml[k]:.1f} ml") for k in shown]
    if len(shown) < len(volumes_ml):
        lines.append((f"and {len(volumes_ml) - len(shown)} more", ""))
    for i, (name, size) in enumerate(lines):
        column, row = divmod(i, layout.legend_entries)
        left = layout.legend_left + column * ENTRY_WIDTH
        middle = top - (row + 0.5) * ENTRY_HEIGHT
        if i < len(shown):
            corner = (left / width, (middle - 0.06) / height)
            color = [value / 255 for value in color_of(shown[i])]
            figure.add_artist(rectangle(corner, 0.16 / width, 0.12 / height, color=color))
        style: dict[str, Any] = {"va": "center", "size": 8, "family": FONT, "parse_math": False}
        figure.text((left + 0.24) / width, middle / height, name, color=TEXT, **style)
        right = (left + ENTRY_WIDTH - 0.15) / width
        figure.text(right, middle / height, size, color=FAINT, ha="right", **style)


def _drawable(name: str) -> str:
    """Shortens a name, and replaces letters that the font lacks."""
    fonts = _import("matplotlib.font_manager")
    letters = fonts.get_font(fonts.findfont(FONT)).get_charmap()
    name = "".join(c if ord(c) in letters else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise VolumeError("previews need matplotlib: pip install 'unetr-flax[view]'") from None
