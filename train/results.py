"""The results of a run on the screen: a table of Dice, a picture, and the paths of all files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.data.targets import drawn_classes
from train.loop import Progress
from train.task import Task
from train.validate import Evaluator
from train.visualize import Column, save_predictions
from unetr_flax.evaluation.dice import DiceScores

PICTURE = "predictions.png"
PICTURED_CASES = 4


def show_results(
    out: Path,
    console: Console,
    task: Task,
    evaluator: Evaluator,
    variables: dict[str, Any],
    progress: Progress,
) -> None:
    """Saves a picture of the best model's predictions; prints its Dice and the paths of all files.

    Args:
      out: the run's folder.
      console: where to print.
      task: the run's task.
      evaluator: segments the pictured validation cases.
      variables: "params" and "batch_stats" of the best model.
      progress: knows the best validation.
    """
    if task.val_cases:
        _show_validation(out / PICTURE, console, task, evaluator, variables, progress)
    else:
        console.print(f"Trained on all cases; the model is that of step {progress.best_step}")
    for name, path in (
        ("picture", out / PICTURE),
        ("metrics", out / "metrics.jsonl"),
        ("TensorBoard", out / "tensorboard"),
        ("best model", out / "model"),
    ):
        if path.exists():
            console.print(f"{name}: {path}", soft_wrap=True)


def _show_validation(
    picture: Path,
    console: Console,
    task: Task,
    evaluator: Evaluator,
    variables: dict[str, Any],
    progress: Progress,
) -> None:
    columns = [
        Column(
            sample.name,
            sample.image[..., 0],
            drawn_classes(task.dataset, sample.label),
            drawn_classes(task.dataset, prediction),
            sample.spacing,
        )
        for sample, prediction in evaluator.segment(variables, task.val_cases[:PICTURED_CASES])
    ]
    save_predictions(picture, columns, task.dataset.labels)
    console.print(
        f"Best on the {len(task.val_cases)} validation cases, at step {progress.best_step}:"
    )
    console.print(results_table(progress.best, task.dataset.labels))


def results_table(scores: DiceScores, classes: Sequence[str]) -> Table:
    """Makes a table with the Dice of each foreground class and their mean.

    Args:
      scores: the scores.
      classes: name of each class, background first.
    """
    table = Table("class")
    table.add_column("Dice", justify="right")
    for name, dice in zip(classes[1:], scores.per_class[1:], strict=True):
        table.add_row(Text(name), f"{dice:.4f}")
    table.add_section()
    table.add_row("mean", f"{scores.mean_foreground:.4f}")
    return table
