"""Writing of files that are replaced whole or not at all, even if the process is killed."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yields a new name beside `path` to write to, and removes what is still there at the end.

    An OSError that names the new file, or no file, as that of a full disk, names `path` instead.
    """
    # The name does not hold that of `path`, which may be as long as the file system allows.
    temporary = path.with_name(f".{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        # What is not there, or cannot be removed, says no more than the error that came before.
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: Path, path: Path) -> None:
    """Puts a staged file in its place, in one indivisible step."""
    os.replace(temporary, path)
    sync(path.parent)


def check_writable(path: Path) -> None:
    """Raises OSError if a file cannot be made in the folder of `path`; leaves nothing there."""
    with staged(path) as temporary:
        temporary.touch()


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all.

    Raises:
      OSError: if it cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all.

    Raises:
      OSError: if it cannot be written.
    """
    with staged(path) as temporary:
        temporary.write_bytes(content)
        sync(temporary)
        commit(temporary, path)
