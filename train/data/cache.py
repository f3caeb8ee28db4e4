"""Prepared cases on disk: written once, whole or not at all, and mapped into memory.

An entry is a folder named by its key, a digest of everything that it depends on: the recipe
(intensity rules, spacing, crop, meaning of the labels) and the content of the case's files. A
changed recipe or file has another key, so what is found is never stale. Several runs may share the
cache: entries are built beside it and moved into place in one step, and whoever comes second keeps
what is there.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data.dataset import Dataset
from train.data.preprocess import Sample
from train.data.targets import count_labels
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.runtime.atomic import sync

# Part of every key; raised when the arrays of an entry change for the same recipe.
VERSION = 1
ARRAYS = ("image", "label", "foreground")
META = "case.json"

# Unfinished entries that nobody can be working on any more.
SECONDS_UNTIL_ABANDONED = 2 * 24 * 3600
_READ_BYTES = 1 << 22
# NumPy parses headers as Python, whose parser in Python 3.11 counts its depth for all threads
# together: once in ten thousands of headers two threads made it raise SystemError.
_READING_HEADERS = threading.Lock()


@dataclasses.dataclass(frozen=True)
class PreparedCase:
    """A case in the cache; its arrays stay on disk until they are opened.

    Attributes:
      name: name of the case.
      folder: the folder of its entry.
      shape: voxels of the model's grid.
      spacing: mm per voxel along each axis.
      counts: voxels of each label of the data set, the background first.
      ignored: voxels that do not count.
      background: lowest intensity of each channel.
      num_bytes: bytes of the arrays.
    """

    name: str
    folder: Path
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    counts: tuple[int, ...]
    ignored: int
    background: tuple[float, ...]
    num_bytes: int

    def open(self) -> Sample:
        """Maps the arrays into memory; voxels are read from disk when they are used.

        Nothing is kept open afterwards but the arrays themselves, so a data set may have more
        cases than a process may have open files.
        """
        with _READING_HEADERS:
            image, label, foreground = (
                np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS
            )
        sample = Sample(self.name, image, label, self.spacing)
        # Both are computed from all voxels, and therefore kept in the entry.
        vars(sample)["foreground"] = foreground
        vars(sample)["background"] = np.array(self.background, np.float32)
        return sample


class PreparedCases(Sequence[Sample]):
    """Prepared cases as a sequence of samples, each opened when it is asked for.

    Args:
      cases: the cases.
    """

    def __init__(self, cases: Sequence[PreparedCase]):
        self.cases = tuple(cases)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Sample:
        return self.cases[index].open()


class Cache:
    """The prepared cases of one recipe in a folder.

    Args:
      folder: the folder, which other recipes and runs may use too.
      dataset: says what label maps mean; its list of cases does not matter.
      preprocessing: preparation of the images.
    """

    def __init__(self, folder: Path, dataset: Dataset, preprocessing: Preprocessing):
        self.folder = folder
        self._recipe = json.dumps(
            {
                "version": VERSION,
                "target": dataset.target,
                "regions": dataset.regions,
                "unused_ids": dataset.unused_ids,
                "ignored_id": dataset.ignored_id,
                "allow_grid_mismatch": dataset.allow_grid_mismatch,
                # Names of channels and classes change nothing about the arrays.
                **preprocessing.to_dict() | {"modalities": None, "labels": None},
                "num_labels": len(dataset.labels),
            },
            sort_keys=True,
        )
        self._dataset = dataset

    def key(self, digests: list[str]) -> str:
        """Computes the key of a case from the digests of its files, in their order."""
        return hashlib.sha256("\n".join([self._recipe, *digests]).encode()).hexdigest()

    def find(self, name: str, key: str) -> PreparedCase | None:
        """Finds an entry whose checksums hold; None if there is none or it is damaged."""
        folder = self._path(key)
        try:
            record = json.loads((folder / META).read_text(encoding="utf-8"))
            content = record["content"]
            if record["checksum"] != _checksum_of_text(content):
                return None
            for array in ARRAYS:
                if content["checksums"][array] != _checksum_of_file(folder / f"{array}.npy"):
                    return None
            return _prepared(name, folder, content)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def add(self, sample: Sample, key: str) -> PreparedCase:
        """Writes an entry, which replaces a damaged one.

        Raises:
          OSError: if it cannot be written.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.folder / f".{os.getpid()}.{uuid.uuid4().hex}.tmp"
        staged.mkdir()
        try:
            content = self._write(sample, staged)
            if path.exists() and self.find(sample.name, key) is None:
                # A rename cannot replace a folder with files, and moving away is one step.
                path.rename(staged / "damaged")
                shutil.rmtree(staged / "damaged")
            try:
                staged.rename(path)
            except OSError:
                # Another run was faster.
                if not path.exists():
                    raise
            sync(path.parent)
            return _prepared(sample.name, path, content)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def remove_abandoned(self) -> None:
        """Removes what processes left behind that were killed while they wrote."""
        for staged in self.folder.glob(".*.tmp"):
            try:
                age = time.time() - staged.stat().st_mtime
            except FileNotFoundError:
                continue
            if age > SECONDS_UNTIL_ABANDONED:
                shutil.rmtree(staged, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _write(self, sample: Sample, folder: Path) -> dict[str, Any]:
        """Writes arrays and record of an entry; returns the content of the record."""
        arrays = {
            "image": sample.image,
            "label": _smallest_signed(sample.label),
            "foreground": _smallest_unsigned(sample.foreground, sample.label.size),
        }
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
            sync(folder / f"{name}.npy")
        counts = count_labels(self._dataset, sample.label)
        content = {
            "shape": list(sample.label.shape),
            "spacing": list(sample.spacing),
            "counts": counts,
            "ignored": int(np.count_nonzero(sample.label < 0)),
            "background": [float(x) for x in sample.background],
            "num_bytes": sum(array.nbytes for array in arrays.values()),
            "checksums": {name: _checksum_of_file(folder / f"{name}.npy") for name in ARRAYS},
        }
        record = {"checksum": _checksum_of_text(content), "content": content}
        (folder / META).write_text(json.dumps(record) + "\n", encoding="utf-8")
        sync(folder / META)
        sync(folder)
        return content


def _prepared(name: str, folder: Path, content: dict[str, Any]) -> PreparedCase:
    return PreparedCase(
        name,
        folder,
        shape=tuple(content["shape"]),
        spacing=tuple(content["spacing"]),
        counts=tuple(content["counts"]),
        ignored=content["ignored"],
        background=tuple(content["background"]),
        num_bytes=content["num_bytes"],
    )


def _smallest_signed(array: np.ndarray) -> np.ndarray:
    """Converts to the smallest signed integers that hold an array."""
    low, high = int(array.min(initial=-1)), int(array.max(initial=0))
    return array.astype(np.promote_types(np.min_scalar_type(low), np.min_scalar_type(-high - 1)))


def _smallest_unsigned(indices: np.ndarray, size: int) -> np.ndarray:
    """Converts indices into an array of some size to the smallest unsigned integers."""
    return indices.astype(np.min_scalar_type(size))


def _checksum_of_text(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _checksum_of_file(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum
