"""Python's garbage collector, paused while programs are traced."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps the garbage collector off.

    Tracing makes about a million objects, none of them garbage, which the collector would search
    again and again.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
