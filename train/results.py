"""The results of a run: scores, pictures, `report.md`, and the paths of all files on the screen."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.data.targets import drawn_classes
from train.events import EventFile
from train.log import VALIDATION_NAME
from train.loop import Progress
from train.report import write_report
from train.run_dir import run_file
from train.scores import Validation
from train.task import Task
from train.validate import Evaluator
from train.visualize import Column, save_predictions
from unetr_flax.evaluation.comparison import Comparison, draw_comparison
from unetr_flax.imaging.volume import escape
from unetr_flax.runtime.atomic import write_bytes

PICTURED_CASES = 4


def show_results(
    out: Path,
    console: Console,
    task: Task,
    evaluator: Evaluator,
    variables: dict[str, Any],
    progress: Progress,
) -> None:
    """Saves pictures and a report of the best model; prints its scores and the paths of all files.

    The pictures show the validation cases with the lowest Dice, and go to TensorBoard, too.

    Args:
      out: the run's folder.
      console: where to print.
      task: the run's task.
      evaluator: segments the pictured validation cases.
      variables: "params" and "batch_stats" of the best model.
      progress: knows the best validation.

    Raises:
      OSError: if a file cannot be written.
    """
    labels = task.dataset.labels
    validation = _read_validation(out, progress)
    worst = validation.worst_cases(PICTURED_CASES)
    by_name = {case.name: case for case in task.val_cases}
    cases = [by_name[name] for name in worst] or list(task.val_cases[:PICTURED_CASES])
    columns, pictures = [], []
    if cases:
        pictures.append(("The worst cases", out / "predictions.png"))
    for earlier in out.glob("worst_[0-9][0-9].png"):
        earlier.unlink()
    for rank, (sample, predicted) in enumerate(evaluator.segment(variables, cases), 1):
        column = Column(
            sample.name,
            sample.image[..., 0],
            drawn_classes(task.dataset, sample.label),
            drawn_classes(task.dataset, predicted),
            sample.spacing,
        )
        columns.append(column)
        title = f"{rank}. {sample.name}"
        comparison = Comparison(
            escape(title), column.prediction, column.label, column.spacing, column.image
        )
        path = out / f"worst_{rank:02}.png"
        names = {i: escape(name) for i, name in enumerate(labels) if i}
        write_bytes(path, draw_comparison(comparison, names))
        pictures.append((title, path))
    if columns:
        save_predictions(pictures[0][1], columns, labels)
    _to_tensorboard(out, pictures, progress.best_step)
    record = json.loads(run_file(out).read_text(encoding="utf-8"))
    report = write_report(out, record, validation, progress.best_step, pictures)
    if cases:
        console.print(
            f"Best on the {len(task.val_cases)} validation cases, at step {progress.best_step}:"
        )
        console.print(results_table(validation, labels))
    else:
        console.print(f"Trained on all cases; the model is that of step {progress.best_step}")
    for name, path in (
        ("report", report),
        *((("picture", pictures[0][1]),) if cases else ()),
        ("metrics", out / "metrics.jsonl"),
        ("TensorBoard", out / "tensorboard"),
        ("best model", out / "model"),
    ):
        console.print(f"{name}: {path}", soft_wrap=True)


def _read_validation(out: Path, progress: Progress) -> Validation:
    """Reads the scores of the best model's cases; older versions left only the mean Dice."""
    try:
        content = json.loads((out / VALIDATION_NAME).read_text(encoding="utf-8"))
        if content["step"] == progress.best_step:
            return Validation.from_dict(content)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return Validation(progress.best)


def _to_tensorboard(out: Path, pictures: Sequence[tuple[str, Path]], step: int) -> None:
    """Adds pictures to the run's TensorBoard."""
    events = EventFile(out / "tensorboard")
    for title, path in pictures:
        pixels = (255 * imread(path)[..., :3]).round().astype(np.uint8)
        events.image(f"predictions/{title}", pixels, step)
    events.close()


def results_table(scores: Validation, classes: Sequence[str]) -> Table:
    """Makes a table with the scores of each foreground class and their mean.

    Args:
      scores: the scores.
      classes: name of each class, background first.
    """
    table = Table("class")
    for heading in ("Dice", *(("surface Dice", "HD95 in mm") if scores.cases else ())):
        table.add_column(heading, justify="right")

    def surfaces(surface_dice: float, hd95: float) -> list[str]:
        return [f"{surface_dice:.4f}", f"{hd95:.2f}"] if scores.cases else []

    for i, name in enumerate(classes[1:], 1):
        means = surfaces(scores.mean("surface_dice", i), scores.mean("hd95", i))
        table.add_row(Text(name), f"{scores.per_class[i]:.4f}", *means)
    table.add_section()
    means = surfaces(scores.mean_over_labels("surface_dice"), scores.mean_over_labels("hd95"))
    table.add_row("mean", f"{scores.mean_foreground:.4f}", *means)
    return table
