"""The log of a run: lines and a progress bar on the screen, metrics.jsonl, TensorBoard events."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.console import make_console
from train.events import EventFile
from train.scores import Validation
from unetr_flax.runtime.atomic import write_text

# The scores of every validation case of the best model.
VALIDATION_NAME = "validation.json"


class RunLog:
    """The log of one run, a context manager.

    Each record is a line of metrics.jsonl with "kind", "epoch" and "step", and the scalars
    `kind/name` in TensorBoard. The kind is "train" after each epoch, "validation" after each
    validation, and "validation_average" after that of averaged weights. A number that is not finite
    is null in JSON.

    Args:
      folder: holds metrics.jsonl and tensorboard/; None writes nothing and prints nothing.
      classes: name of each class, background first.
      total_steps: number of steps of the whole run, whose last epoch may be a part of one.
      steps_per_epoch: number of steps in an epoch.
      step: number of steps already taken. Records of later steps, left by a run that was cut off
        after its last checkpoint, are removed.
      validated_step: the last step that counts as validated; records of later validations are
        removed, as these are done again. It is `step` if None.
    """

    def __init__(
        self,
        folder: Path | None,
        classes: Sequence[str],
        total_steps: int,
        steps_per_epoch: int,
        step: int = 0,
        validated_step: int | None = None,
    ):
        self.console = make_console(quiet=folder is None)
        self._folder = folder
        self._classes = classes
        self._steps_per_epoch = steps_per_epoch
        self._epochs = self._epoch(total_steps)
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
            "", total=total_steps, completed=step, epoch="", loss="-"
        )
        self._file = self._events = None
        if folder is not None:
            path = folder / "metrics.jsonl"
            _drop_later(path, step, step if validated_step is None else validated_step)
            self._file = path.open("a", encoding="utf-8")
            self._events = EventFile(folder / "tensorboard", purge_step=step + 1)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()
        if self._file is not None and self._events is not None:
            for file in (self._file, self._events):
                # What could not be written has been told, and cannot be written now either.
                with contextlib.suppress(OSError):
                    file.close()

    def step(self, step: int, loss: float) -> None:
        """Moves the progress bar to a step."""
        epoch = f"{self._epoch(step)}/{self._epochs}"
        self._progress.update(self._task, completed=step, epoch=epoch, loss=f"{loss:.4f}")

    def skipped(self, step: int, loss: float) -> None:
        """Tells that a step was skipped as its loss or gradient is not finite."""
        reason = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        self.console.print(f"step {step} skipped: {reason}", soft_wrap=True)

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Records the means of an epoch that ends with `step`."""
        self._record("train", step, values)

    def validation(self, step: int, scores: Validation, kind: str = "validation") -> None:
        """Records the Dice of each foreground class, and the means of Dice and surfaces.

        Args:
          step: the step that was validated.
          scores: the scores of all cases.
          kind: the kind of the record.
        """
        values = {"mean_dice": scores.mean_foreground}
        values |= dict(zip(self._classes[1:], scores.per_class[1:].tolist(), strict=True))
        if scores.cases:
            values["mean_surface_dice"] = scores.mean_over_labels("surface_dice")
            values["mean_hd95_mm"] = scores.mean_over_labels("hd95")
        self._record(kind, step, values)

    def best(self, step: int, scores: Validation) -> None:
        """Writes the scores of the best model so far to validation.json."""
        if self._folder is not None:
            content = json.dumps({"step": step, **scores.to_dict()}, indent=1, allow_nan=False)
            write_text(self._folder / VALIDATION_NAME, content + "\n")

    def _epoch(self, step: int) -> int:
        """Returns the epoch that a step belongs to, the first one being 1."""
        return math.ceil(step / self._steps_per_epoch)

    def _record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        epoch = self._epoch(step)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        # A validation without cases has no numbers.
        if any(map(math.isfinite, values.values())):
            self.console.print(f"epoch {epoch}/{self._epochs}  {kind}  {numbers}", soft_wrap=True)
        if self._file is None or self._events is None:
            return
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        record: dict[str, Any] = {"kind": kind, "epoch": epoch, "step": step, **finite}
        with _named(Path(self._file.name)):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        with _named(self._events.path):
            for name, value in values.items():
                self._events.scalar(f"{kind}/{name}", value, step)
            self._events.flush()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the file's name to an error of writing, which lacks it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _drop_later(path: Path, step: int, validated_step: int) -> None:
    """Removes the records after a step, and validations after another, from metrics.jsonl."""
    if not path.exists():
        return
    # A process that was killed may have left half a line.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line[-1] == "\n"]
    kept = []
    for line in lines:
        record = json.loads(line)
        if record["step"] <= (step if record["kind"] == "train" else validated_step):
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")
