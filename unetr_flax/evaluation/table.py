"""Tables of scores for a person at a terminal."""

import math
from collections.abc import Sequence

from unetr_flax.evaluation.report import Report
from unetr_flax.evaluation.scores import METRICS
from unetr_flax.evaluation.summary import Estimate
from unetr_flax.imaging.volume import escape

# Headings of the metrics, in two lines.
HEADINGS = {
    "dice": ("Dice", ""),
    "iou": ("IoU", ""),
    "surface_dice": ("surface", "Dice"),
    "hd95": ("HD95", "mm"),
    "assd": ("ASSD", "mm"),
    "volume_difference": ("volume", "ml"),
    "relative_volume_difference": ("volume", "%"),
}
OUTCOMES = ("empty", "missed", "invented")


def label_table(report: Report) -> str:
    """Formats each label's means, with intervals and medians below, and the mean over labels."""
    head = [["label", "cases"], ["", ""]]
    for line in range(2):
        head[line] += [HEADINGS[metric.name][line] for metric in METRICS]
        head[line] += OUTCOMES if line == 0 else [""] * len(OUTCOMES)
    rows = []
    for i, label in report.summary.labels.items():
        counts = [str(label.outcomes[outcome]) for outcome in OUTCOMES]
        rows += _lines(escape(report.names[i]), str(label.cases), label.estimates, counts)
    if len(report.summary.labels) > 1:
        blank = [""] * len(OUTCOMES)
        rows += _lines("mean over labels", "", report.summary.over_labels, blank)
    return format_table(head, rows)


def case_table(report: Report) -> str:
    """Formats the scores of each label in each case."""
    metrics = [HEADINGS[metric.name] for metric in METRICS]
    head = [
        ["case", "label", *(top for top, _ in metrics), ""],
        ["", "", *(bottom for _, bottom in metrics), ""],
    ]
    rows = []
    for name, case in report.cases.items():
        for k, (i, scores) in enumerate(case.items()):
            values = [format_value(m.name, getattr(scores, m.name)) for m in METRICS]
            outcome = "" if scores.outcome == "found" else scores.outcome
            shown = escape(name) if k == 0 else ""
            rows.append([shown, escape(report.names[i]), *values, outcome])
    return format_table(head, rows, left=2)


def format_table(head: list[list[str]], rows: Sequence[list[str]], left: int = 1) -> str:
    """Formats lines of cells as columns.

    Args:
      head: lines of headings.
      rows: the other lines.
      left: number of columns, from the first on, that are flush left.
    """
    widths = [max(map(len, column)) for column in zip(*head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([*map(line, head), rule, *map(line, rows)])


def format_value(metric: str, value: float) -> str:
    """Formats the value of a metric; "-" if it is not defined."""
    if math.isnan(value):
        return "-"
    if metric == "relative_volume_difference":
        return f"{100 * value:+.1f}"
    if metric == "volume_difference":
        return f"{value:+.1f}" if abs(value) >= 100 else f"{value:+.3f}"
    if metric in ("hd95", "assd"):
        return f"{value:.2f}"
    return f"{value:.3f}"


def _lines(
    name: str, cases: str, estimates: dict[str, Estimate], counts: list[str]
) -> list[list[str]]:
    """Returns the line of means, and those of their intervals and medians where these are known."""
    blank = [""] * len(counts)
    fields = {"mean": name, "low": "  95 % from", "high": "         to", "median": "  median"}
    lines = []
    for field, title in fields.items():
        values = [getattr(estimates[metric.name], field) for metric in METRICS]
        if field == "mean" or not all(map(math.isnan, values)):
            shown = [format_value(m.name, v) for m, v in zip(METRICS, values, strict=True)]
            rest = [cases, *shown, *counts] if field == "mean" else ["", *shown, *blank]
            lines.append([title, *rest])
    return lines
