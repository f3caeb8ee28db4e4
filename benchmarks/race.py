"""Sides that take turns, so that whatever slows the machine slows all of them."""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.cases import Case

# Logits and losses of two sides that compute the same differ by rounding only.
AGREEMENT = {"float32": 1e-4, "bfloat16": 3e-2}


class RaceError(Exception):
    """A side that fell over, or computes something else; the message says which."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one side took for "forward" or "step" of a case.

    Attributes:
      case: the model and the shape.
      side: who.
      what: "forward" or "step".
      first: seconds of the first call, compilation included.
      walls: seconds of each later call.
      cpus: seconds of all cores of each later call.
      peak: bytes at most while a step runs; None for "forward".
    """

    case: Case
    side: str
    what: str
    first: float
    walls: list[float]
    cpus: list[float]
    peak: int | None

    @property
    def median(self) -> float:
        """The median of `walls`."""
        return statistics.median(self.walls)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, relative to the median."""
        low, _, high = statistics.quantiles(self.walls, n=4)
        return (high - low) / 2 / self.median


class Side:
    """A worker's process.

    Args:
      name: which side.
      case: what it computes.
      log: file for what it prints besides answers.
      keep_freed_memory: whether its malloc keeps freed memory.
    """

    def __init__(self, name: str, case: Case, log: Path, keep_freed_memory: bool):
        self.name = name
        self._log = log
        command = [sys.executable, "-m", "benchmarks.worker", name, case.family]
        command += [str(case.edge), str(case.batch), case.dtype]
        command += ["--keep-freed-memory"] if keep_freed_memory else []
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._answer()

    def ask(self, command: str) -> dict:
        """Has the worker do one thing.

        Raises:
          RaceError: if it fell over.
        """
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the worker."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RaceError(f"{self.name}: fell over, {self._log} says why")
        return json.loads(line)


def race(
    case: Case,
    names: list[str],
    rounds: int,
    out: Path,
    *,
    keep_freed_memory: bool,
    profile: bool,
    say: Callable[[str], None],
) -> list[Result]:
    """Lets the sides of a case take turns.

    Args:
      case: what is computed.
      names: the sides, in the order of their turns.
      rounds: timed calls of each side.
      out: folder for logs and traces.
      keep_freed_memory: the same setting of malloc for all sides.
      profile: whether to trace one step of each side at the end.
      say: takes a line of progress.

    Raises:
      RaceError: if a side falls over, or computes something else than the first.
    """
    out.mkdir(parents=True, exist_ok=True)
    sides: list[Side] = []
    try:
        for name in names:
            say(f"{case}: {name} starts")
            sides.append(Side(name, case, out / f"{name}.log", keep_freed_memory))
        results = []
        for what in ("forward", "step"):
            first = {side.name: side.ask(what) for side in sides}
            _check_agreement(case, what, {name: answer["value"] for name, answer in first.items()})
            for side in sides:
                side.ask(what)
            answers: dict[str, list[dict]] = {name: [] for name in names}
            for turn in range(rounds):
                say(f"{case}: {what} {turn + 1}/{rounds}")
                for side in sides:
                    answers[side.name].append(side.ask(what))
            results += [
                Result(
                    case=case,
                    side=side.name,
                    what=what,
                    first=first[side.name]["wall"],
                    walls=[answer["wall"] for answer in answers[side.name]],
                    cpus=[answer["cpu"] for answer in answers[side.name]],
                    peak=side.ask("peak")["peak"] if what == "step" else None,
                )
                for side in sides
            ]
        if profile:
            for side in sides:
                say(f"{case}: trace {side.ask(f'profile {out / side.name}')['trace']}")
        return results
    finally:
        for side in sides:
            side.close()


def _check_agreement(case: Case, what: str, values: dict[str, list[float]]) -> None:
    """Raises if a side does not compute what the first does."""
    reference_name, reference = next(iter(values.items()))
    for name, value in values.items():
        for ours, theirs in zip(reference, value, strict=True):
            if not abs(ours - theirs) <= AGREEMENT[case.dtype] * abs(theirs):
                raise RaceError(
                    f"{case}: {what} of {reference_name} gives {ours}, of {name} {theirs}; they "
                    "must agree before they are timed"
                )
