"""Box plots of the scores of each label. Needs matplotlib."""

import numpy as np

from unetr_flax.evaluation.drawing import label_color, make_figure, to_png
from unetr_flax.evaluation.report import Report
from unetr_flax.imaging.volume import escape

# Metric, heading and factor of each panel; the panels of a row share the axis of labels.
PANELS = (
    (("dice", "Dice", 1), ("iou", "IoU", 1), ("surface_dice", "surface Dice, {tolerance:g} mm", 1)),
    (
        ("hd95", "HD95 in mm", 1),
        ("assd", "ASSD in mm", 1),
        ("relative_volume_difference", "volume difference in %", 100),
    ),
)
FRACTIONS = ("dice", "iou", "surface_dice")
LINE_INCHES = 0.34
# Matplotlib draws no picture of more than 65535 pixels.
MOST_INCHES = 400
# With fewer cases only the dots are drawn.
FEWEST_FOR_BOX = 4


def box_plots(report: Report) -> bytes:
    """Draws a panel per metric with a box per label, as the content of a PNG file.

    A box spans the quartiles, its line is the median, the whiskers reach to the last case within
    1.5 times the height of the box; every case is a dot. Infinite values have no place on the axis:
    their number stands at the right. With less than four cases there are dots and no boxes.
    """
    ids = list(report.names)
    height = min(2 * (0.8 + LINE_INCHES * max(len(ids), 2)) + 0.4, MOST_INCHES)
    longest = max((len(report.names[i]) for i in ids), default=0)
    figure = make_figure(9.0 + 0.07 * min(longest, 40), height)
    axes = figure.subplots(len(PANELS), len(PANELS[0]), squeeze=False, sharey=True)
    rng = np.random.default_rng(0)
    for row, panels in zip(axes, PANELS, strict=True):
        for axis, (metric, heading, factor) in zip(row, panels, strict=True):
            axis.set_title(heading.format(tolerance=report.tolerance), fontsize=10)
            for place, i in enumerate(ids):
                values = factor * _values(report, i, metric)
                _draw(axis, place, values, label_color(i), rng)
            if metric in FRACTIONS:
                left = max(0, axis.get_xlim()[0])
                axis.set_xlim(left - 0.03 * (1 - left), 1 + 0.03 * (1 - left))
            elif metric == "relative_volume_difference":
                axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
            else:
                axis.set_xlim(left=-0.03 * axis.get_xlim()[1])
            axis.grid(axis="x", color="0.9")
            axis.tick_params(labelsize=8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    names = [_shorten(escape(report.names[i])) for i in ids]
    axes[0, 0].set_yticks(range(len(ids)), names)
    axes[0, 0].set_ylim(len(ids) - 0.5, -0.5)
    cases = "1 case" if len(report.cases) == 1 else f"{len(report.cases)} cases"
    figure.suptitle(cases, fontsize=10)
    return to_png(figure)


def _values(report: Report, label: int, metric: str) -> np.ndarray:
    scores = [case[label] for case in report.cases.values()]
    return np.array(
        [
            getattr(one, metric)
            for one in scores
            if report.empty == "agree" or one.outcome != "empty"
        ]
    )


def _draw(axis, place: int, values: np.ndarray, color, rng: np.random.Generator) -> None:
    """Draws the box, the dots and the number of infinite values of one label."""
    finite = values[np.isfinite(values)]
    few = len(finite) < FEWEST_FOR_BOX
    if not few:
        axis.boxplot(
            finite,
            positions=[place],
            orientation="horizontal",
            widths=0.6,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": (*color, 0.25), "edgecolor": color},
            medianprops={"color": "black"},
            whiskerprops={"color": color},
            capprops={"color": color},
            manage_ticks=False,
        )
    heights = place + (0 if few else 1) * rng.uniform(-0.18, 0.18, len(finite))
    axis.plot(finite, heights, "o", color=color, markersize=5 if few else 1.5, alpha=0.6)
    if len(finite) < len(values):
        axis.text(
            1.01,
            place,
            f"{len(values) - len(finite)} inf",
            transform=axis.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color="tab:red",
        )


def _shorten(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."
