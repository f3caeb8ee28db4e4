"""The schedule of a run with a budget: measured once, before the first step, and recorded."""

import dataclasses
import math
import time

import jax
import numpy as np
from rich.console import Console

from train import distributed, sharding
from train.budget import BudgetError, Times, steps_that_fit, time_steps
from train.config import Config
from train.data.loader import Batches
from train.loop import Schedule
from train.program import Program
from train.results import PICTURED_CASES
from train.run_dir import OptionError, record_schedule, recorded_schedule
from train.scores import judge
from train.state import create_state
from train.task import Task
from train.validate import Evaluator
from unetr_flax import UNETR

# Writing of the model, the pictures and the report, besides segmenting what they show.
RESULTS_SECONDS = 3.0


def schedule_of_budget(
    cfg: Config,
    task: Task,
    model: UNETR,
    mesh: jax.sharding.Mesh,
    program: Program,
    schedule: Schedule,
    evaluator: Evaluator,
    batches: Batches,
    started: float,
    console: Console,
) -> Schedule:
    """Returns the schedule that fits into the budget: the recorded one, or one that is measured.

    Args:
      cfg: the options of the run.
      task: the run's task.
      model: its model.
      mesh: the devices.
      program: its compiled step, of any length.
      schedule: the one that the run would have without a budget.
      evaluator: is timed on one case.
      batches: the data; they are at their beginning again afterwards.
      started: when the run began, on the monotonic clock.
      console: where to print.

    Raises:
      OptionError: if no training fits into the budget.
    """
    recorded = recorded_schedule(cfg.out)
    if recorded is None:
        times = _measure(cfg, task, model, mesh, program, evaluator, batches, started)
        budget = cfg.training.budget
        assert budget is not None
        # The clocks of the processes differ; that of the main one counts.
        chosen, refused = np.zeros(2, np.int32), None
        if distributed.is_main():
            try:
                chosen[:] = steps_that_fit(budget, times)
            except BudgetError as error:
                refused = error
        steps, pause = map(int, distributed.process_sum(chosen))
        if steps == 0:
            raise OptionError(str(refused or f"--budget {budget}: no training fits into it"))
        recorded = {"total_steps": steps, "validation_steps": pause}
        written = recorded | {
            f"{k}_seconds": round(v, 4) for k, v in dataclasses.asdict(times).items()
        }
        distributed.run_on_main(lambda: record_schedule(cfg.out, written))
        console.print(
            f"--budget {budget}: {times.step:.3g} s a step and {times.validation:.3g} s a "
            f"validation leave room for {steps} steps",
            soft_wrap=True,
        )
    return dataclasses.replace(
        schedule,
        total_steps=recorded["total_steps"],
        validation_steps=recorded["validation_steps"],
    )


def _measure(
    cfg: Config,
    task: Task,
    model: UNETR,
    mesh: jax.sharding.Mesh,
    program: Program,
    evaluator: Evaluator,
    batches: Batches,
    started: float,
) -> Times:
    """Times steps and a validation with a state that is thrown away; see `schedule_of_budget`."""
    training = cfg.training
    assert training.budget is not None
    averaged = training.ema_decay > 0
    program.wait()
    placed = sharding.state_sharding(program.abstract, mesh)
    state = create_state(model, program.tx, training.seed, placed, averaged=averaged)
    place = batches.state()

    def step() -> None:
        nonlocal state
        state, metrics = program.train_step(state, sharding.shard_batch(next(batches), mesh))
        jax.block_until_ready(metrics)

    step_seconds = time_steps(step, training.budget)
    batches.restore(place)
    variables = sharding.local_copy(state.variables)
    for _ in range(2):  # the first one compiles
        begun, segmented = time.monotonic(), 0.0
        for sample, prediction in evaluator.segment(variables, task.val_cases[:1]):
            segmented = time.monotonic() - begun
            judge(task.dataset, prediction, sample.label, sample.spacing)
        judged = time.monotonic() - begun
    cases = math.ceil(len(task.val_cases) / jax.process_count())
    return Times(
        spent=time.monotonic() - started,
        step=step_seconds,
        validation=judged * cases * (2 if averaged else 1),
        results=segmented * min(PICTURED_CASES, len(task.val_cases)) + RESULTS_SECONDS,
    )
