"""`report.md`: what a run did and reached: its plan, its scores, its curves and its worst cases."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.options import option
from train.run_dir import PLAN_NAME
from train.scores import TOLERANCE, Validation
from unetr_flax.evaluation.drawing import make_figure, to_png
from unetr_flax.runtime.atomic import write_bytes, write_text

# Records of metrics.jsonl and the names in them that get a panel, each with its heading.
PANELS = (
    ("Loss", ("train", "loss")),
    ("Learning rate", ("train", "learning_rate")),
    ("Mean Dice of validation", ("validation", "mean_dice")),
)
AVERAGE = "validation_average"


def write_report(
    out: Path,
    record: Mapping[str, Any],
    validation: Validation,
    step: int,
    pictures: Sequence[tuple[str, Path]],
) -> Path:
    """Writes `report.md` and its picture of curves, `curves.png`.

    Args:
      out: the run's folder.
      record: the content of its `run.json`.
      validation: the scores of the best model.
      step: number of training steps of that model.
      pictures: title and path of each picture to show, below the run's folder.

    Returns:
      The path of the report.

    Raises:
      OSError: if a file cannot be written.
    """
    write_bytes(out / "curves.png", draw_curves(read_metrics(out)))
    dataset = record["dataset"]
    scores = [
        f"Best model: step {step}, mean Dice {validation.mean_foreground:.4f} over the "
        f"{len(dataset['validation'])} validation cases.",
        "",
        "## Scores",
        "",
        *scores_table(validation, dataset["labels"]),
        "",
        "Means over the validation cases, each on the grid of its own scan. Dice and surface Dice "
        "are over the cases where label or prediction has the structure, HD95 where both have it. "
        f"Surface Dice counts distances up to {TOLERANCE:g} mm as agreement.",
    ]
    if not dataset["validation"]:
        scores = [f"Trained on all cases; the model is that of step {step}."]
    lines = [
        f"# {_text(dataset['name'])}",
        "",
        *scores,
        "",
        "## Curves",
        "",
        "![Curves](curves.png)",
        "",
        "## Pictures",
        "",
    ]
    for title, path in pictures:
        lines += [f"![{_text(title)}]({path.relative_to(out).as_posix()})", ""]
    lines += ["## Plan", ""]
    if (out / PLAN_NAME).exists():
        lines += ["```", *(out / PLAN_NAME).read_text(encoding="utf-8").splitlines(), "```", ""]
    lines += [*plan_table(record), ""]
    write_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


def scores_table(validation: Validation, labels: Sequence[str]) -> list[str]:
    """Makes the lines of a Markdown table with the scores of each label and their mean.

    Args:
      validation: the scores.
      labels: names of the labels, background first.
    """
    lines = [
        "| label | Dice | surface Dice | HD95 in mm | found | missed | invented |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for i, name in enumerate(labels[1:], 1):
        outcomes = validation.outcomes(i)
        numbers = " | ".join(str(outcomes[key]) for key in ("found", "missed", "invented"))
        lines.append(
            f"| {_text(name)} | {validation.per_class[i]:.4f} "
            f"| {validation.mean('surface_dice', i):.4f} | {validation.mean('hd95', i):.2f} "
            f"| {numbers} |"
        )
    lines.append(
        f"| mean | {validation.mean_foreground:.4f} "
        f"| {validation.mean_over_labels('surface_dice'):.4f} "
        f"| {validation.mean_over_labels('hd95'):.2f} | | | |"
    )
    return lines


def plan_table(record: Mapping[str, Any]) -> list[str]:
    """Makes the lines of a Markdown table of the model's window, the data and all options.

    Args:
      record: the content of a `run.json`.
    """
    rows = {
        "window in voxels": record["model"]["img_size"],
        "channels": record["dataset"]["modalities"],
        "validation cases": record["dataset"]["validation"],
        **record.get("schedule", {}),
        **{option(name): value for name, value in record["options"].items()},
    }
    lines = ["| what | value |", "| --- | --- |"]
    return lines + [f"| {_text(name)} | {_text(_show(value))} |" for name, value in rows.items()]


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Reads the records of a run's metrics.jsonl."""
    with (out / "metrics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def draw_curves(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Draws loss, learning rate and mean Dice over the steps, as the content of a PNG file.

    Args:
      records: the lines of metrics.jsonl.
    """
    figure = make_figure(4.0 * len(PANELS), 3.0)
    axes = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for axis, (title, (kind, name)) in zip(axes, PANELS, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.9")
        for shown, label in ((kind, "weights"), (AVERAGE, "averaged weights")):
            points = [
                (r["step"], r[name])
                for r in records
                if r["kind"] == shown and r.get(name) is not None
            ]
            if points and (shown == kind or kind == "validation"):
                axis.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=label)
        if len(axis.lines) > 1:
            axis.legend(fontsize=8)
    return to_png(figure)


def _show(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _text(name: str) -> str:
    """Escapes what Markdown would read as markup."""
    for character in "\\`*_[]<>|#!$":
        name = name.replace(character, "\\" + character)
    return " ".join(name.split())
