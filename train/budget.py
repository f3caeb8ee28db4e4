"""A run of a given time: how many steps fit into it, from the time that a few steps take."""

import dataclasses
import math
import re
import time
from collections.abc import Callable

import numpy as np

from train.distributed import is_main, process_sum

UNITS = {"s": 1, "m": 60, "h": 3600}
# Validation may take this share of the time after preparation, in at most so many validations.
VALIDATION_SHARE = 0.05
MOST_VALIDATIONS = 10
# Share of the time that stays free, as steps do not always take equally long.
RESERVE = 0.05
# Steps are timed for this share of the budget, within these limits.
TIMING_SHARE = 0.02
FEWEST_TIMED, MOST_TIMED = 3, 50


class BudgetError(ValueError):
    """A budget into which no training fits; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Times that are known before training begins, in seconds.

    Attributes:
      spent: time since the start of the run, and until its first step.
      step: one step, with waiting for its data.
      validation: one validation.
      results: all that comes after the last validation.
    """

    spent: float
    step: float
    validation: float
    results: float


def seconds(budget: str) -> float:
    """Reads a budget such as 90s, 15m, 2h or 1.5h.

    Raises:
      ValueError: if it is something else, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if not found or not float(found[1]):
        raise ValueError("must be a time such as 90s, 15m or 2h")
    return float(found[1]) * UNITS[found[2]]


def steps_that_fit(budget: str, times: Times) -> tuple[int, int]:
    """Chooses the length of a run and the pauses between its validations.

    Args:
      budget: the time of the whole run, see `seconds`.
      times: what is known of it.

    Returns:
      Number of steps of the run, and number of steps between validations, the last of which comes
      at the end.

    Raises:
      BudgetError: if not even one step and one validation fit.
    """
    rest = (1 - RESERVE) * (seconds(budget) - times.spent - times.results)
    validations = int(VALIDATION_SHARE * rest / max(times.validation, 1e-9))
    validations = min(max(validations, 1), MOST_VALIDATIONS)
    steps = int((rest - validations * times.validation) / times.step)
    if steps < 1:
        raise BudgetError(
            f"--budget {budget}: no training fits into it; {times.spent:.0f} s pass before the "
            f"first step, {times.validation + times.results:.0f} s after the last one, and a step "
            f"takes {times.step:.3g} s"
        )
    validations = min(validations, steps)
    return steps, math.ceil(steps / validations)


def time_steps(step: Callable[[], None], budget: str) -> float:
    """Measures the seconds of a step; every process must call it.

    Args:
      step: takes one step and waits for its end; it is compiled already.
      budget: the time of the whole run, of which a small share is spent.
    """
    step()  # The first one also allocates memory.
    passed = _time(step, FEWEST_TIMED)
    affordable = int(TIMING_SHARE * seconds(budget) / max(passed / FEWEST_TIMED, 1e-9))
    more = max(0, min(affordable, MOST_TIMED) - FEWEST_TIMED)
    # Processes take their steps together, so that the clock of the main one counts.
    more = int(process_sum(np.array(more if is_main() else 0, np.int32)))
    return (passed + _time(step, more)) / (FEWEST_TIMED + more)


def _time(step: Callable[[], None], number: int) -> float:
    """Measures the seconds of a number of steps."""
    started = time.monotonic()
    for _ in range(number):
        step()
    return time.monotonic() - started
