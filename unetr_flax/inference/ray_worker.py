"""A worker of a Ray cluster: the models on one device."""

from collections.abc import Callable, Iterator

from unetr_flax.inference.pipeline import FAILURES, Case, Outcome
from unetr_flax.runtime.ending import one_line

# `segment_cases` with all but its cases and its progress callback.
Segment = Callable[..., Iterator[Outcome]]


class Stopped(Exception):
    """Ends a case between two batches of windows, so that its temporary files are removed."""


class Worker:
    """Segments one case after the other; made a Ray actor by the pool."""

    def __init__(self) -> None:
        self._stopped = False

    def build(self, build: Callable[[], Segment]) -> str | None:
        """Loads the models; returns what is wrong if that fails."""
        try:
            self._segment = build()
        except FAILURES as error:
            return one_line(error)
        return None

    def segment(self, case: Case) -> Outcome:
        """Segments a case and writes its files."""
        [outcome] = self._segment([case], progress=self._check)
        return outcome

    def stop(self) -> None:
        """Makes the present case end without a result."""
        self._stopped = True

    def _check(self, case: Case, done: int, count: int) -> None:
        if self._stopped:
            raise Stopped
