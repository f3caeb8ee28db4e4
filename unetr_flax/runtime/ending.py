"""The end of a command's process."""

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
