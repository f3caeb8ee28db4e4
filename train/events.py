"""TensorBoard's event files, written in the calling thread.

tensorboardX itself writes in a thread of its own, whose errors, such as a full disk, are pages of
tracebacks that nobody can handle.
"""

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

# A generated module, whose messages no type checker knows.
messages: Any = event_pb2


# A number that is not finite, such as the Dice of a class that no case has, is no reason to warn.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


class EventFile:
    """One event file of TensorBoard.

    Args:
      folder: holds the file; made if absent.
      purge_step: TensorBoard hides events of earlier files from this step on; none if None.

    Raises:
      OSError: if the file cannot be made.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._writer = RecordWriter(str(self.path))
        self._write(messages.Event(file_version="brain.Event:2"))
        if purge_step is None:
            return
        start = messages.SessionLog(status=messages.SessionLog.SessionStatus.START)
        self._write(messages.Event(session_log=start, step=purge_step))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Adds a number.

        Raises:
          OSError: if it cannot be written.
        """
        self._write(messages.Event(summary=summary.scalar(tag, value), step=step))

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Adds a picture, uint8 [height, width, 3].

        Raises:
          OSError: if it cannot be written.
        """
        picture: Any = summary.image(tag, pixels, dataformats="HWC")
        self._write(messages.Event(summary=picture, step=step))

    def flush(self) -> None:
        """Hands all events to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
