"""Runs of whole predictions, each in a process of its own, and what they took."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.01


class PredictionError(Exception):
    """A process failed; the message is the last line that it printed."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One process, from its start to its end.

    Attributes:
      wall: seconds.
      cpu: processor seconds, summed over cores.
      peak: most bytes of memory at a time.
      start: when it was started, on the clock of `time.perf_counter`.
      answer: the JSON that it printed in its last line; empty if it printed none.
    """

    wall: float
    cpu: float
    peak: int
    start: float
    answer: dict[str, Any]

    def stage(self, name: str) -> float:
        """Returns the seconds of a stage."""
        return self.answer["seconds"].get(name, 0.0)


def run(arguments: Sequence[str | Path], cache: Path, log: Path) -> Run:
    """Runs `python -m ARGUMENTS` and waits for it.

    Args:
      arguments: a module and its arguments.
      cache: where it keeps compiled programs (XDG_CACHE_HOME).
      log: file for what it prints.

    Raises:
      PredictionError: if it fails.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.absolute())}
    with log.open("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            stdout=output,
            stderr=output,
            env=environment,
        )
        peak = 0
        # Its usage would not do: a process inherits the peak of the one that started it.
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            peak = max(peak, _peak(process.pid))
            time.sleep(POLL_SECONDS)
        _, status, usage = ended
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        last = (output.read().splitlines() or [""])[-1]
    if process.returncode:
        raise PredictionError(f"{arguments[0]}: failed, {log} says why: {last}")
    answer = json.loads(last) if last.startswith('{"seconds"') else {}
    return Run(wall, usage.ru_utime + usage.ru_stime, peak, start, answer)


def _peak(pid: int) -> int:
    """Returns the most bytes that a process had so far; 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def median(runs: Sequence[Run], value: Any) -> float:
    """Returns the median of a function of the runs."""
    return statistics.median(value(one) for one in runs)
