"""The end of a command: its last line and its process."""

import contextlib
import os
import sys
from typing import NoReturn


def end_process(status: int) -> NoReturn:
    """Ends the process, after a failure or an interrupt without waiting for its threads.

    Otherwise Python would wait for a compilation in the background, which nobody needs any more.

    Args:
      status: the exit status.
    """
    if status == 0:
        sys.exit(0)
    for stream in (sys.stdout, sys.stderr):
        # A closed pipe takes no more lines.
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def one_line(error: Exception) -> str:
    """Shortens a message of many lines to the first line and the first item that it lists."""
    first, *others = str(error).splitlines() or [type(error).__name__]
    if not others:
        return first
    more = f", and {len(others) - 1} more" if len(others) > 1 else ""
    return f"{first}: {others[0].strip()}{more}"
