"""The training loop: evaluate, save, next batch, step, log."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from train.checkpoint import Checkpoints
from train.distributed import any_process
from train.ema import candidates
from train.interrupt import Interrupt
from train.log import RunLog
from train.state import TrainState
from unetr_flax.evaluation.dice import DiceScores

# Steps that may run on the device while the host prepares the next.
STEPS_IN_FLIGHT = 2
# Steps after which several processes ask each other whether one of them was interrupted.
STEPS_BETWEEN_QUESTIONS = 10


class DivergenceError(RuntimeError):
    """The loss is no longer a number."""


class Batches(Iterator[Any], Protocol):
    """The interface of the data: batches without end, and a place in them that can be saved."""

    def state(self) -> dict[str, Any]:
        """Returns the place of the iterator, as JSON types."""
        ...


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The length of a training run and of the pauses between validations.

    Attributes:
      steps_per_epoch: steps of one pass over the training cases.
      epochs: passes.
      eval_every: epochs between validations; after the last there is one in any case.
    """

    steps_per_epoch: int
    epochs: int
    eval_every: int

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def validates_at(self, step: int) -> bool:
        """Returns whether there is a validation after so many steps."""
        due = step > 0 and step % (self.steps_per_epoch * self.eval_every) == 0
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
      sum_steps: number of those steps.
    """

    validated_step: int = 0
    best_step: int = 0
    best_dice: list[float] = dataclasses.field(default_factory=list)
    best_mean: float = -math.inf
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    sum_steps: int = 0

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
    evaluate: Callable[[TrainState], DiceScores | None],
    learning_rate: Callable[[int], Any],
    checkpoints: Checkpoints,
    log: RunLog,
    interrupt: Interrupt,
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
      checkpoints: saves after each validation and when interrupted.
      log: takes the metrics.
      interrupt: tells whether to stop.

    Returns:
      Whether the end was reached.

    Raises:
      DivergenceError: if the loss is not finite. The last checkpoint stays as it was.
    """
    step = int(state.step)
    in_flight = collections.deque()
    several_processes = jax.process_count() > 1

    def settle(limit: int) -> None:
        """Reads metrics, waiting for the device, until no more than `limit` are outstanding."""
        while len(in_flight) > limit:
            number, metrics = in_flight.popleft()
            values = {name: float(x) for name, x in jax.device_get(metrics).items()}
            if not math.isfinite(values["loss"]):
                raise DivergenceError(
                    f"loss is {values['loss']} at step {number}; try a lower --learning-rate"
                )
            for name, x in values.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + x
            progress.sum_steps += 1
            log.step(number, values["loss"])

    started = time.monotonic()
    while True:
        validated = False
        if schedule.validates_at(step) and progress.validated_step != step:
            compared = []
            for kind, candidate in candidates(state).items():
                scores = evaluate(candidate)
                if scores is None:
                    break
                compared.append((kind, candidate, scores))
            else:
                validated = True
                progress.validated_step = step
                for kind, _, scores in compared:
                    log.validation(step, scores, kind)
                # Of one step only the better candidate may be saved.
                _, best, scores = max(compared, key=lambda x: x[-1].mean_foreground)
                # A mean of nan (no class is present) must count as better, hence the negation.
                if not scores.mean_foreground <= progress.best_mean:
                    progress.best_step, progress.best_mean = step, scores.mean_foreground
                    progress.best_dice = scores.per_class.tolist()
                    checkpoints.save_best(best)
                started = time.monotonic()
        stop = interrupt.requested
        if several_processes:
            # All processes must stop at the same step, and asking makes the device wait.
            asks = step % STEPS_BETWEEN_QUESTIONS == 0 or schedule.validates_at(step)
            if asks:
                settle(0)
            stop = asks and any_process(stop)
        if validated or stop:
            settle(0)
            resume_state = {"batches": batches.state(), "progress": dataclasses.asdict(progress)}
            checkpoints.save_last(state, resume_state)
        if step >= schedule.total_steps or stop:
            return step >= schedule.total_steps and progress.validated_step == step

        state, metrics = train_step(state, shard_batch(next(batches)))
        step += 1
        in_flight.append((step, metrics))
        settle(STEPS_IN_FLIGHT)

        if step % schedule.steps_per_epoch == 0:
            settle(0)
            means = {name: x / progress.sum_steps for name, x in progress.sums.items()}
            now = time.monotonic()
            rate = float(learning_rate(step - 1))
            log.train(step, means | {"learning_rate": rate, "seconds": now - started})
            progress.sums, progress.sum_steps = {}, 0
            started = now
