"""What `unetr predict` prints."""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unetr_flax.commands.predict_options import Outputs

if TYPE_CHECKING:
    from unetr_flax.inference.pipeline import Case, Outcome


class Console:
    """What the command prints: text, one line that changes on a terminal, or JSON at the end."""

    def __init__(self, outputs: Outputs):
        self._silent = outputs.quiet or outputs.json
        self._json = outputs.json
        self._statistics = outputs.statistics
        self._line = 0
        self._started: tuple[str, float] = ("", 0.0)

    def say(self, text: str) -> None:
        if not self._silent:
            self._clear()
            print(_plain(text), flush=True)

    def progress(self, case: "Case", done: int, count: int) -> None:
        """Shows the windows that are done, and how fast, on a terminal."""
        now = time.perf_counter()
        if self._started[0] != case.name:
            # The first windows may have waited for the compiler.
            self._started = (case.name, now)
            self._first = done
        if self._silent or not sys.stderr.isatty():
            return
        seconds = now - self._started[1]
        speed = f", {(done - self._first) / seconds:.2f} windows/s" if done > self._first else ""
        text = _plain(f"{case.name}: {done}/{count} windows{speed}")
        print(f"\r{text.ljust(self._line)}", end="", file=sys.stderr, flush=True)
        self._line = len(text)

    def outcome(
        self, outcome: "Outcome", number: int, count: int, names: Mapping[int, str]
    ) -> None:
        """Prints what became of a case; errors also if nothing else is printed."""
        case = outcome.case
        if outcome.status == "failed":
            self._clear()
            print(_plain(f"unetr: {case.name}: failed: {outcome.error}"), file=sys.stderr)
            return
        if outcome.nan_voxels:
            self.say(f"{case.name}: {outcome.nan_voxels} voxels were NaN, taken for the lowest")
        found = [
            f"{names.get(label, label)} {voxels:,}"
            for label, voxels in outcome.voxels.items()
            if label
        ]
        self.say(
            f"[{number}/{count}] {case.outputs.labels}: "
            f"{', '.join(found) + ' voxels' if found else 'no label'}, {outcome.seconds:.1f} s"
        )
        if self._statistics and count == 1 and not self._silent:
            from unetr_flax.viewing.statistics import print_table

            print_table(outcome.statistics)

    def summarize(
        self, outcomes: "Sequence[Outcome]", skipped: "Sequence[Case]", *, masks: bool
    ) -> None:
        """Prints all outcomes as JSON, if that is wanted.

        Args:
          outcomes: what became of the cases.
          skipped: cases that were done before.
          masks: whether the label maps are 4D masks of overlapping regions.
        """
        if not self._json:
            return
        rows: list[dict[str, Any]] = []
        for outcome in outcomes:
            row = {
                "name": outcome.case.name,
                "status": outcome.status,
                "labels": str(outcome.case.outputs.labels),
                "error": outcome.error,
                "seconds": round(outcome.seconds, 3),
                "voxels": outcome.voxels,
                "nan_voxels": outcome.nan_voxels,
            }
            if self._statistics:
                row["statistics"] = [dataclasses.asdict(label) for label in outcome.statistics]
            rows.append(row)
        rows += [
            {"name": case.name, "status": "skipped", "labels": str(case.outputs.labels)}
            for case in skipped
        ]
        print(json.dumps({"masks": masks, "cases": rows}, indent=2))

    def _clear(self) -> None:
        if self._line:
            print(f"\r{' ' * self._line}\r", end="", file=sys.stderr, flush=True)
            self._line = 0


def _plain(text: str) -> str:
    """Keeps names of files from breaking lines."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
