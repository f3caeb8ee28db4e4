"""Times sides that compute the same.

On CPU the sides take turns, so that whatever slows the machine slows all of them. On an accelerator
they run one after the other, so that each has all of the device's memory.
"""

import contextlib
import dataclasses
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.cases import Case, environment
from benchmarks.roofline import Cost

# Logits and losses of two sides that compute the same differ by rounding only.
AGREEMENT = {"float32": 1e-4, "bfloat16": 3e-2}
WHAT = ("forward", "step")
OUT_OF_MEMORY = "out of memory"


class RaceError(Exception):
    """A side failed, or computes something else than the others; the message says which."""


class SideError(Exception):
    """A side has too little memory for a case; the message says so."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Times of one side for "forward" or "step" of a case.

    Attributes:
      case: the model and the shape.
      side: name of the side.
      what: "forward" or "step".
      first: seconds of the first call, compilation included.
      walls: seconds of each later call.
      cpus: processor seconds of each later call, summed over cores.
      peak: peak of bytes in use during a step; None for "forward".
      cost: XLA's figures for the program; None for PyTorch, and where XLA has none.
      failure: the reason why there are no times; None if there are.
    """

    case: Case
    side: str
    what: str
    first: float = 0.0
    walls: list[float] = dataclasses.field(default_factory=list)
    cpus: list[float] = dataclasses.field(default_factory=list)
    peak: int | None = None
    cost: Cost | None = None
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median of `walls`."""
        return statistics.median(self.walls)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        low, _, high = statistics.quantiles(self.walls, n=4)
        return (high - low) / 2 / self.median

    @property
    def volumes_per_second(self) -> float:
        """Volumes of the batch divided by the median."""
        return self.case.batch / self.median


class Side:
    """A process that runs one side.

    Args:
      name: name of the side.
      case: the case that it computes.
      log: file for everything that it prints besides answers.
      keep_freed_memory: whether its malloc keeps freed memory.

    Attributes:
      device: where it computes: "cpu", "gpu" or "tpu".

    Raises:
      RaceError: if the process failed.
      SideError: if it has too little memory for the model.
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
                env=environment(name),
            )
        try:
            self.device = self._answer()["device"]
        except BaseException:
            self.close()
            raise

    def ask(self, command: str) -> dict:
        """Sends a command to the worker and returns its answer.

        Raises:
          RaceError: if the worker failed.
          SideError: if it has too little memory.
        """
        # A worker that has ended is noticed below, as it does not answer.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the worker."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            # The kernel kills a process with this signal when memory runs out.
            if self._process.wait() == -signal.SIGKILL:
                raise SideError(OUT_OF_MEMORY)
            raise RaceError(f"{self.name}: fell over, {self._log} says why")
        answer = json.loads(line)
        if "failure" in answer:
            raise SideError(answer["failure"])
        if "error" in answer:
            raise RaceError(f"{self.name}: {answer['error']}")
        return answer


def race(
    case: Case,
    names: list[str],
    rounds: int,
    out: Path,
    *,
    device: str,
    keep_freed_memory: bool,
    profile: bool,
    say: Callable[[str], None],
) -> list[Result]:
    """Times the sides of a case.

    Args:
      case: the model and the shape.
      names: the sides, in the order of their turns.
      rounds: number of timed calls of each side.
      out: folder for logs and traces.
      device: "cpu", "gpu" or "tpu"; all sides must compute there.
      keep_freed_memory: whether malloc keeps freed memory, for all sides.
      profile: whether to trace one step of each side at the end.
      say: function that takes a line of progress.

    Returns:
      The results, "forward" of all sides first. A side with too little memory has results without
      times.

    Raises:
      RaceError: if a side fails, or computes something else than the first.
    """
    out.mkdir(parents=True, exist_ok=True)
    results, values = {}, {}
    for group in [names] if device == "cpu" else [[name] for name in names]:
        heat = _Heat(case, group, rounds, out, device, keep_freed_memory, profile, say)
        found, came_out = heat.run()
        results |= found
        values |= came_out
    for what in WHAT:
        _check_agreement(
            case, what, {name: values[name, what] for name in names if (name, what) in values}
        )
    return [results[name, what] for what in WHAT for name in names]


@dataclasses.dataclass
class _Heat:
    """The sides that run at the same time; the fields are the arguments of `race`."""

    case: Case
    names: list[str]
    rounds: int
    out: Path
    device: str
    keep_freed_memory: bool
    profile: bool
    say: Callable[[str], None]

    def run(self) -> tuple[dict, dict]:
        """Returns results, and values of the first call, both by side and "forward" or "step"."""
        self._results: dict[tuple[str, str], Result] = {}
        self._sides: dict[str, Side] = {}
        values = {}
        try:
            for name in self.names:
                self.say(f"{self.case}: {name} starts")
                log = self.out / f"{name}.log"
                try:
                    self._sides[name] = Side(name, self.case, log, self.keep_freed_memory)
                except SideError as error:
                    self._fail(name, WHAT, error)
            for side in self._sides.values():
                if side.device != self.device:
                    raise RaceError(
                        f"{side.name}: computes on {side.device}, the race is on {self.device}"
                    )
            for what in WHAT:
                first = self._ask_all(what, what)
                values |= {(name, what): answer["value"] for name, answer in first.items()}
                _check_agreement(self.case, what, {n: a["value"] for n, a in first.items()})
                self._time(what, first)
            if self.profile:
                for name in list(self._sides):
                    trace = self._ask(name, f"profile {self.out / name}", "step")
                    if trace:
                        self.say(f"{self.case}: trace {trace['trace']}")
        finally:
            for side in self._sides.values():
                side.close()
        return self._results, values

    def _time(self, what: str, first: dict[str, dict]) -> None:
        self._ask_all(what, what)
        turns = []
        for turn in range(self.rounds):
            self.say(f"{self.case}: {what} {turn + 1}/{self.rounds}")
            turns.append(self._ask_all(what, what))
        for name in list(self._sides):
            peak = self._ask(name, "peak", what) if what == "step" else {"peak": None}
            cost = self._ask(name, f"cost {what}", what)
            if peak is None or cost is None:
                continue
            self._results[name, what] = Result(
                case=self.case,
                side=name,
                what=what,
                first=first[name]["wall"],
                walls=[answers[name]["wall"] for answers in turns],
                cpus=[answers[name]["cpu"] for answers in turns],
                peak=peak["peak"],
                cost=Cost(**cost) if cost else None,
            )

    def _ask_all(self, command: str, what: str) -> dict[str, dict]:
        answers = {name: self._ask(name, command, what) for name in list(self._sides)}
        return {name: answer for name, answer in answers.items() if answer is not None}

    def _ask(self, name: str, command: str, what: str) -> dict | None:
        """Asks a side; returns None and ends the side if it has too little memory."""
        try:
            return self._sides[name].ask(command)
        except SideError as error:
            self._sides.pop(name).close()
            self._fail(name, WHAT[WHAT.index(what) :], error)
            return None

    def _fail(self, name: str, whats: tuple[str, ...], error: SideError) -> None:
        self.say(f"{self.case}: {name}: {error}")
        for what in whats:
            self._results[name, what] = Result(self.case, name, what, failure=str(error))


def _check_agreement(case: Case, what: str, values: dict[str, list[float]]) -> None:
    """Raises RaceError if a side computes something else than the first."""
    if not values:
        return
    reference_name, reference = next(iter(values.items()))
    for name, value in values.items():
        for ours, theirs in zip(reference, value, strict=True):
            if not abs(ours - theirs) <= AGREEMENT[case.dtype] * abs(theirs):
                raise RaceError(
                    f"{case}: {what} of {reference_name} gives {ours}, of {name} {theirs}; they "
                    "must agree before they are timed"
                )
