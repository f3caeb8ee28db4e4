"""Digests of the content of files, remembered as long as the files do not change."""

import hashlib
import json
import os
from pathlib import Path

from train.data.stored_files import stored_files
from unetr_flax.runtime.atomic import write_text


def file_digests(paths: tuple[Path, ...], memory: Path) -> list[str]:
    """Computes the SHA-256 of all files that images and label maps are read from.

    Args:
      paths: files, or folders of DICOM series.
      memory: a folder that remembers digests with size, time of change and number of each file, so
        that files which did not change are not read again.

    Returns:
      A digest for each file.

    Raises:
      VolumeError: if a header cannot be read.
      OSError: if a file cannot be read.
    """
    files = [file for path in paths for file in stored_files(path)]
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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
