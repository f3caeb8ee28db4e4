"""Files opened for reading, and never anything that could hang: pipes, devices, loops of links."""

import io
import os
import stat
from pathlib import Path

from unetr_flax.imaging.volume import VolumeError

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular_file(path: Path) -> io.BufferedReader:
    """Opens a regular file, or a link to one, for reading.

    Raises:
      VolumeError: if there is none, or if it cannot be opened.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return path.open("rb")
    except FileNotFoundError:
        raise VolumeError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise VolumeError(f"{path}: cannot be opened ({reason(error)})") from None
    kind = next((name for test, name in KINDS if test(mode)), "something else")
    raise VolumeError(f"{path}: {kind}, must be a file")


def reason(error: Exception) -> str:
    """Says in one line what an error is, without the names of files that OSError repeats."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
