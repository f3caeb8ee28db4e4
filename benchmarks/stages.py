"""Time that a program spends in some of its functions, measured while it runs as it is."""

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stages:
    """Seconds spent in stages; the time of a stage within another one is only the inner one's.

    Attributes:
      seconds: seconds of each stage, over all threads.
      calls: times at which calls of each stage ended, on the clock of `time.perf_counter`.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, list[float]] = defaultdict(list)
        self._threads = threading.local()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures what is done within."""
        stack = self._threads.__dict__.setdefault("stack", [])
        start = time.perf_counter()
        stack.append(0.0)
        try:
            yield
        finally:
            end = time.perf_counter()
            inner = stack.pop()
            self.seconds[name] += end - start - inner
            self.calls[name].append(end)
            if stack:
                stack[-1] += end - start

    def measure(
        self,
        owner: Any,
        function: str,
        name: str,
        finish: Callable[[Any], Any] = lambda result: result,
    ) -> None:
        """Makes all further calls of a function count as a stage.

        Args:
          owner: the module or class that has the function.
          function: its name there.
          name: the stage.
          finish: waits for a result; the wait counts as well.
        """
        wrapped = getattr(owner, function)

        @functools.wraps(wrapped)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return finish(wrapped(*args, **kwargs))

        setattr(owner, function, call)
