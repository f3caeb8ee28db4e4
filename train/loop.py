"""The training loop: evaluate, save, next batch, step, log."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self

import jax
import numpy as np

from train.agreement import Agreement
from train.checkpoint import Checkpoints
from train.ema import candidates
from train.interrupt import Interrupt
from train.log import RunLog
from train.scores import Validation
from train.state import TrainState
from unetr_flax.evaluation.dice import DiceScores

# Steps that may run on the device while the host prepares the next.
STEPS_IN_FLIGHT = 2
# Skipped steps in a row that end a run.
MOST_SKIPPED = 10


class DivergenceError(RuntimeError):
    """The loss or the gradient is not finite, step after step."""


class Batches(Iterator[Any], Protocol):
    """The interface of the data: batches without end, and a place in them that can be saved."""

    waited: float
    """Seconds that `next` has waited so far."""

    def state(self) -> dict[str, Any]:
        """Returns the place of the iterator, as JSON types."""
        ...


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The length of a training run and of the pauses between validations.

    Attributes:
      steps_per_epoch: steps of one pass over the training cases.
      total_steps: steps of the whole run.
      validation_steps: steps between validations; after the last step there is one in any case.
    """

    steps_per_epoch: int
    total_steps: int
    validation_steps: int

    @classmethod
    def of_epochs(cls, steps_per_epoch: int, epochs: int, eval_every: int) -> Self:
        """Makes the schedule of so many epochs, with so many epochs between validations."""
        return cls(steps_per_epoch, steps_per_epoch * epochs, steps_per_epoch * eval_every)

    @property
    def epochs(self) -> int:
        """Number of passes over the training cases, of which the last may be a part of one."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def validates_at(self, step: int) -> bool:
        """Returns whether there is a validation after so many steps."""
        due = step > 0 and step % self.validation_steps == 0
        return due or step >= self.total_steps


@dataclasses.dataclass
class Progress:
    """The results of a run so far; part of the resume state in a checkpoint.

    Attributes:
      validated_step: the last step that was validated.
      best_step: the step with the best mean foreground Dice.
      best_dice: Dice per class at that step, background first; nan where a class is absent.
      best_mean: mean foreground Dice at that step.
      sums: sum of each metric over the steps of the current epoch.
      sum_steps: number of those steps, without those that were skipped.
      skipped: number of steps that were skipped as loss or gradient was not finite.
      skipped_in_a_row: number of those since the last step that was not skipped.
    """

    validated_step: int = 0
    best_step: int = 0
    best_dice: list[float] = dataclasses.field(default_factory=list)
    best_mean: float = -math.inf
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    sum_steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @property
    def best(self) -> DiceScores:
        """The scores of the best validation."""
        return DiceScores(np.array(self.best_dice), self.best_mean)


def fit(
    state: TrainState,
    progress: Progress,
    *,
    schedule: Schedule,
    batches: Batches,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    shard_batch: Callable[[Any], Any],
    evaluate: Callable[[TrainState], Validation | None],
    learning_rate: Callable[[int], Any],
    checkpoints: Checkpoints,
    log: RunLog,
    interrupt: Interrupt,
    save_seconds: float = math.inf,
) -> bool:
    """Trains from a state to the end, or until interrupted; in both cases everything is saved.

    Args:
      state: the state to start from; its buffers are donated.
      progress: the progress that belongs to `state`; updated in place.
      schedule: length of the run and pauses between validations.
      batches: the data, at the place that belongs to `state`.
      train_step: see `train.step.make_train_step`.
      shard_batch: puts a batch on the devices.
      evaluate: validates a state; returns None if interrupted. If the state keeps an average, both
        are validated, and the better one may become the best model.
      learning_rate: the learning rate as a function of the step.
      checkpoints: saves before each validation, which adds its results, when interrupted, and every
        `save_seconds`.
      log: takes the metrics.
      interrupt: tells whether to stop.
      save_seconds: longest time between two checkpoints.

    Returns:
      Whether the end was reached.

    Raises:
      DivergenceError: if `MOST_SKIPPED` steps in a row had to be skipped. The last checkpoint stays
        as it was.
      train.checkpoint.CheckpointError: if a checkpoint cannot be written.
      OSError: if metrics cannot be written.
    """
    step = int(state.step)
    in_flight = collections.deque()
    agreement = Agreement(2)

    def settle(limit: int) -> None:
        """Reads metrics, waiting for the device, until no more than `limit` are outstanding."""
        while len(in_flight) > limit:
            number, metrics = in_flight.popleft()
            values = {name: float(x) for name, x in jax.device_get(metrics).items()}
            if values.pop("skipped"):
                _count_skipped(progress, number, values["loss"], checkpoints, log)
                continue
            progress.skipped_in_a_row = 0
            for name, x in values.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + x
            progress.sum_steps += 1
            log.step(number, values["loss"])

    def save() -> None:
        resume_state = {"batches": batches.state(), "progress": dataclasses.asdict(progress)}
        checkpoints.save_last(state, resume_state)

    started = saved = time.monotonic()
    waited_before = batches.waited
    while True:
        validated = broken_off = False
        if schedule.validates_at(step) and progress.validated_step != step:
            settle(0)
            # A run that is cut off within a long validation, or has no memory for it, goes on here.
            save()
            compared = []
            for kind, candidate in candidates(state).items():
                scores = evaluate(candidate)
                if scores is None:
                    broken_off = True
                    break
                compared.append((kind, candidate, scores))
            else:
                validated = True
                progress.validated_step = step
                best = None
                for kind, candidate, scores in compared:
                    log.validation(step, scores, kind)
                    # A mean of nan (no class is present) must count as better, hence the negation.
                    if not scores.mean_foreground <= progress.best_mean:
                        progress.best_step, progress.best_mean = step, scores.mean_foreground
                        progress.best_dice = scores.per_class.tolist()
                        best = candidate, scores
                if best is not None:
                    candidate, scores = best
                    log.best(step, scores)
                    checkpoints.save_best(candidate)
                started = time.monotonic()
        stop, due = agreement(interrupt.requested, time.monotonic() - saved > save_seconds)
        stop |= broken_off
        if validated or stop or due:
            settle(0)
            save()
            saved = time.monotonic()
            agreement.forget()
        if step >= schedule.total_steps or stop:
            checkpoints.wait()
            return step >= schedule.total_steps and progress.validated_step == step

        state, metrics = train_step(state, shard_batch(next(batches)))
        step += 1
        in_flight.append((step, metrics))
        settle(STEPS_IN_FLIGHT)
        checkpoints.check()

        if step % schedule.steps_per_epoch == 0 or step == schedule.total_steps:
            settle(0)
            means = {name: x / progress.sum_steps for name, x in progress.sums.items()}
            if progress.skipped:
                means["skipped_steps"] = progress.skipped
            now = time.monotonic()
            rate = float(learning_rate(step - 1))
            seconds, waited = now - started, batches.waited - waited_before
            times = {"seconds": seconds, "waiting_for_data": waited / max(seconds, 1e-9)}
            log.train(step, means | {"learning_rate": rate} | times)
            waited_before = batches.waited
            progress.sums, progress.sum_steps = {}, 0
            started = now


def _count_skipped(
    progress: Progress, step: int, loss: float, checkpoints: Checkpoints, log: RunLog
) -> None:
    """Counts and tells a skipped step, and ends the run after too many.

    Raises:
      DivergenceError: if there are `MOST_SKIPPED` in a row.
    """
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    log.skipped(step, loss)
    if progress.skipped_in_a_row >= MOST_SKIPPED:
        last = checkpoints.last_step
        saved = "there is no checkpoint" if last is None else f"the last checkpoint has step {last}"
        raise DivergenceError(
            f"loss or gradient was not finite in {MOST_SKIPPED} steps in a row, up to step {step}; "
            f"{saved}; try a lower --learning-rate"
        )
