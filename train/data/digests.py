"""Digests of the content of files, remembered as long as the files do not change."""

import hashlib
import json
import os
from pathlib import Path

from unetr_flax.runtime.atomic import write_text


def file_digests(paths: tuple[Path, ...], memory: Path) -> list[str]:
    """Computes the SHA-256 of files; a folder, as of a DICOM series, counts as all its files.

    Args:
      paths: files or folders.
      memory: a folder that remembers digests with size, time of change and number of each file, so
        that files which did not change are not read again.

    Returns:
      A digest for each file.

    Raises:
      OSError: if a file cannot be read.
    """
    files = [file for path in paths for file in _files(path)]
    status = [os.stat(file) for file in files]
    stamps = [[s.st_size, s.st_mtime_ns, s.st_ino] for s in status]
    name = hashlib.sha256("\n".join(os.path.abspath(file) for file in files).encode()).hexdigest()
    path = memory / f"{name}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["stamps"] == stamps and len(known["digests"]) == len(files):
            return known["digests"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digests = [_digest(file) for file in files]
    memory.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"stamps": stamps, "digests": digests}))
    return digests


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
