"""The lock of a run's folder: one folder belongs to one running process at a time.

The lock is a POSIX record lock on `run.lock`, which the kernel drops when its owner ends, however
it ends. Unlike `flock`, children that outlive a killed owner do not keep it.
"""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = "run.lock"
# Launchers tell each of their tasks how many there are, and which one it is.
TASK_VARIABLES = (
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("WORLD_SIZE", "RANK"),
)
HELD = (errno.EACCES, errno.EAGAIN)
# File systems without locks answer with one of these.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockedError(RuntimeError):
    """A folder whose lock another process holds; the message says who."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes the folder if it is absent, and holds its lock for the duration of the context.

    On a file system that knows no locks, the context goes on without one, and says so.

    Raises:
      LockedError: if another process holds the lock.
      OSError: if the folder or the lock file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _open_locked(out / LOCK_NAME) as file:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def tasks_of_launcher() -> tuple[int, int]:
    """Returns how many tasks a launcher such as Slurm has started, and which of them this is."""
    for size, rank in TASK_VARIABLES:
        try:
            return int(os.environ[size]), int(os.environ[rank])
        except (KeyError, ValueError):
            continue
    return 1, 0


def _open_locked(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file, path)
            # A run that ended before it began may have removed the file since it was opened.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: IO[str], path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            print(f"{path}: {error.strerror}; goes on without a lock", file=sys.stderr)
            return
        if error.errno not in HELD:
            raise
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise LockedError(f"--out {path.parent}: is in use by {owner}{_launcher_hint()}") from None


def _launcher_hint() -> str:
    """Explains the likely reason where a launcher has started several tasks."""
    size, rank = tasks_of_launcher()
    if size == 1:
        return "; give another folder, or wait for its end"
    return (
        f"; this is task {rank} of {size}, each of which would train alone: start one task, or "
        "connect them with --coordinator-address, --num-processes and --process-id"
    )
