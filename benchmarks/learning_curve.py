"""Curves of learning: Dice on cases that are not trained on against the minutes of training."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The file to which a side appends its points, in its folder.
CURVE = "curve.jsonl"


@dataclasses.dataclass(frozen=True)
class Point:
    """One validation.

    Attributes:
      seconds: time of training so far.
      step: steps of training so far.
      dice: mean foreground Dice.
    """

    seconds: float
    step: int
    dice: float


def read_curve(path: Path) -> list[Point]:
    """Reads the points of a side; none if it wrote none."""
    if not path.exists():
        return []
    return [Point(**json.loads(line)) for line in path.read_text().splitlines()]


def minutes_to(points: Sequence[Point], dice: float) -> float | None:
    """Returns the minutes after which a validation first reached a Dice; None if none did."""
    return next((point.seconds / 60 for point in points if point.dice >= dice), None)


def markdown(curves: Mapping[str, Sequence[Point]], heading: Sequence[str]) -> str:
    """Makes a table with a row for each side.

    Args:
      curves: the points of each side by its name.
      heading: lines that say what was measured, and on what.
    """
    # The Dice that all sides reached is where their times can be compared.
    common = min(max(point.dice for point in points) for points in curves.values())
    lines = [
        *heading,
        "",
        f"| side | steps | minutes | Dice at the end | best Dice | minutes to {common:.3f} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, points in curves.items():
        last, best = points[-1], max(point.dice for point in points)
        lines.append(
            f"| {name} | {last.step} | {last.seconds / 60:.1f} | {last.dice:.4f} | {best:.4f} "
            f"| {minutes_to(points, common):.1f} |"
        )
    return "\n".join(lines) + "\n"


def dice_limits(curves: Mapping[str, Sequence[Point]]) -> tuple[float, float]:
    """Returns the range of Dice to draw: what matters, and the best of every side."""
    best = [max(point.dice for point in points) for points in curves.values()]
    return max(0.0, min(max(best) - 0.25, min(best) - 0.05)), max(best) + 0.02


def plot(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draws the curves of all sides."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in curves.items():
        minutes = [point.seconds / 60 for point in points]
        axis.plot(minutes, [point.dice for point in points], marker="o", label=name)
    axis.set(xlabel="minutes of training", ylabel="mean foreground Dice, validation cases")
    axis.set_ylim(dice_limits(curves))
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
