"""The log of a run: lines and a progress bar on the screen, metrics.jsonl, TensorBoard events."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from train.console import make_console
from unetr_flax.evaluation.dice import DiceScores


class RunLog:
    """The log of one run, a context manager.

    Each record is a line of metrics.jsonl with "kind", "epoch" and "step", and the scalars
    `kind/name` in TensorBoard. The kind is "train" after each epoch, "validation" after each
    validation, and "validation_average" after that of averaged weights. A number that is not finite
    is null in JSON.

    Args:
      folder: holds metrics.jsonl and tensorboard/; None writes nothing and prints nothing.
      classes: name of each class, background first.
      epochs: number of epochs of the whole run.
      steps_per_epoch: number of steps in an epoch.
      step: number of steps already taken. Records of later steps, left by a run that was cut off
        after its last checkpoint, are removed.
    """

    def __init__(
        self,
        folder: Path | None,
        classes: Sequence[str],
        epochs: int,
        steps_per_epoch: int,
        step: int = 0,
    ):
        self.console = make_console(quiet=folder is None)
        self._classes = classes
        self._epochs = epochs
        self._steps_per_epoch = steps_per_epoch
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=epochs * steps_per_epoch, completed=step, epoch="", loss="-"
        )
        self._file = self._events = None
        if folder is not None:
            path = folder / "metrics.jsonl"
            _drop_later(path, step)
            self._file = path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()

    def step(self, step: int, loss: float) -> None:
        """Moves the progress bar to a step."""
        epoch = f"{math.ceil(step / self._steps_per_epoch)}/{self._epochs}"
        self._progress.update(self._task, completed=step, epoch=epoch, loss=f"{loss:.4f}")

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Records the means of an epoch that ends with `step`."""
        self._record("train", step, values)

    def validation(self, step: int, scores: DiceScores, kind: str = "validation") -> None:
        """Records the Dice of each foreground class and their mean."""
        values = dict(zip(self._classes[1:], scores.per_class[1:].tolist(), strict=True))
        self._record(kind, step, {"mean_dice": scores.mean_foreground, **values})

    def _record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        epoch = step // self._steps_per_epoch
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.console.print(f"epoch {epoch}/{self._epochs}  {kind}  {numbers}", soft_wrap=True)
        if self._file is None or self._events is None:
            return
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        record: dict[str, Any] = {"kind": kind, "epoch": epoch, "step": step, **finite}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step, time.time())


def _drop_later(path: Path, step: int) -> None:
    """Removes the records after a step from metrics.jsonl."""
    if not path.exists():
        return
    # A process that was killed may have left half a line.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line[-1] == "\n"]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")
