"""The share of one process in a run that many processes do, each for itself."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def find_part(
    given: str | None, environment: Mapping[str, str] = os.environ
) -> tuple[int, int, str] | None:
    """Finds which part of how many this process does.

    Args:
      given: "I/N", the I-th of N parts, I from 1 to N. None to take it from the variables of a
        Slurm array (SLURM_ARRAY_TASK_ID, _MIN, _STEP and _COUNT) or of an indexed job of
        Kubernetes (JOB_COMPLETION_INDEX, and JOB_COMPLETIONS that the job must set to its number
        of completions).
      environment: the variables.

    Returns:
      I, N, and where they come from; None if there is one part.

    Raises:
      ValueError: if they are no part.
    """
    if given is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", given)
        part, parts = (int(group) for group in match.groups()) if match else (0, 0)
        if not 1 <= part <= parts:
            raise ValueError(f"--part {given}: must be I/N, with I from 1 to N")
        return part, parts, "--part"
    if "SLURM_ARRAY_TASK_ID" in environment:
        number = _integer(environment, "SLURM_ARRAY_TASK_ID")
        first = _integer(environment, "SLURM_ARRAY_TASK_MIN", 0)
        step = max(1, _integer(environment, "SLURM_ARRAY_TASK_STEP", 1))
        parts = _integer(environment, "SLURM_ARRAY_TASK_COUNT")
        return _checked((number - first) // step + 1, parts, "SLURM_ARRAY_TASK_ID")
    if "JOB_COMPLETION_INDEX" in environment:
        index = _integer(environment, "JOB_COMPLETION_INDEX")
        return _checked(index + 1, _integer(environment, "JOB_COMPLETIONS"), "JOB_COMPLETION_INDEX")
    return None


def take_part(items: Sequence[T], part: int, parts: int) -> list[T]:
    """Returns every N-th of some items, from the I-th on; all parts together are all items."""
    return list(items[part - 1 :: parts])


def _checked(part: int, parts: int, source: str) -> tuple[int, int, str]:
    if not 1 <= part <= parts:
        raise ValueError(f"{source}: is part {part} of {parts}; --part I/N says which it is")
    return part, parts, source


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise ValueError(
            f"{name}={value!r}: must be an integer; --part I/N says which part this is"
        ) from None
