"""The files that a segmented case becomes."""

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import numpy as np

from unetr_flax.imaging.file_grid import FileGrid
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.imaging.regular_file import reason
from unetr_flax.imaging.volume import Volume, escape
from unetr_flax.inference.segmentation import Segmentation
from unetr_flax.runtime.atomic import staged, write_text
from unetr_flax.viewing import display_window, label_statistics, to_json, write_page, write_preview
from unetr_flax.viewing.statistics import LabelStatistics


@dataclasses.dataclass(frozen=True)
class Extras:
    """What is written for each case beside its label map.

    Attributes:
      probabilities: CASE.probabilities.nii.gz, the probability of each class on the scan's grid.
      statistics: CASE.statistics.json, measurements of each label.
      preview: CASE.png, three planes through the largest cross-section.
      html: CASE.html, a page to scroll through the scan and its labels.
    """

    probabilities: bool = False
    statistics: bool = False
    preview: bool = False
    html: bool = False

    @property
    def need_scan(self) -> bool:
        """True if something is measured or shown of the scan itself."""
        return self.statistics or self.preview or self.html


@dataclasses.dataclass(frozen=True)
class CaseOutputs:
    """The paths of a case's files.

    Attributes:
      labels: label map; it is written last, so that where it is there all files of the case are.
      names: JSON file of the names of the labels, which cases may share.
    """

    labels: Path
    names: Path

    @classmethod
    def of_file(cls, labels: Path) -> Self:
        """Makes the paths of a case that has its names to itself."""
        return cls(labels, Path(f"{_stem(labels)}.labels.json"))

    @property
    def stem(self) -> str:
        """Path of the label map without its ending."""
        return _stem(self.labels)

    def beside(self, ending: str) -> Path:
        """Returns the path of another file of the case."""
        return Path(f"{self.stem}.{ending}")

    @contextlib.contextmanager
    def probabilities_on_disk(self, grid: FileGrid, num_classes: int) -> Iterator[np.ndarray]:
        """Makes a temporary array [X, Y, Z, K] on disk, zero, beside the case's files.

        Probabilities of many classes on a scan's own grid may be more than memory holds.

        Raises:
          OSError: if the disk has no room for it.
        """
        self.labels.parent.mkdir(parents=True, exist_ok=True)
        shape = (*grid.canonical_shape, num_classes)
        with staged(self.labels) as path:
            try:
                _allocate(path, math.prod(shape) * np.dtype(np.float32).itemsize)
            except OSError as error:
                # Python's message would name the staged file, or no file.
                name = escape(str(self.beside("probabilities.nii.gz")))
                raise type(error)(f"{name}: no file for its array ({reason(error)})") from None
            yield np.memmap(path, np.float32, "r+", shape=shape)


def write_outputs(
    outputs: CaseOutputs,
    extras: Extras,
    segmentation: Segmentation,
    preprocessing: Preprocessing,
) -> list[LabelStatistics]:
    """Writes the files of a case, each whole or not at all, the label map last.

    The names of the labels follow, so that they are never there alone.

    Returns:
      The statistics of each label, if they are asked for.

    Raises:
      OSError: if a file cannot be written.
      VolumeError: if a package that is needed is not installed.
    """
    outputs.labels.parent.mkdir(parents=True, exist_ok=True)
    volume, names = segmentation.volume, segmentation.names
    window = display_window(preprocessing)
    rows = []
    if extras.need_scan:
        assert volume is not None
        labels = segmentation.visible
        if extras.statistics:
            rows = _statistics(volume, segmentation)
            write_text(outputs.beside("statistics.json"), to_json(rows))
        if extras.preview:
            write_preview(outputs.beside("png"), volume, labels, names, window=window)
        if extras.html:
            write_page(outputs.beside("html"), volume, labels, names, window=window)
    if segmentation.probabilities is not None and segmentation.grid is not None:
        path = outputs.beside("probabilities.nii.gz")
        segmentation.grid.write_probabilities(path, segmentation.probabilities)
    segmentation.save(outputs.labels)
    write_names(outputs.names, names)
    return rows


def write_names(path: Path, names: Mapping[int, str]) -> None:
    """Writes the names of labels, if there are any, unless the file has them already.

    Raises:
      OSError: if the file cannot be written.
    """
    if not names:
        return
    text = json.dumps({name: label for label, name in sorted(names.items())}, indent=2) + "\n"
    # Cases that share the file are many, and a file system on the network is slow.
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def _stem(path: Path) -> str:
    """Returns the path of a NIfTI file without its ending."""
    ending = ".nii.gz" if path.name.lower().endswith(".nii.gz") else ".nii"
    return str(path)[: -len(ending)]


def _allocate(path: Path, size: int) -> None:
    """Makes a file of zeros, with its room on the disk where the file system can promise that.

    A mapped page that turns out to have no room on a full disk is no error, but ends the process.
    """
    with path.open("wb") as file:
        file.truncate(size)
        # macOS has no such call, and some file systems do not support it.
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise


def _statistics(volume: Volume, segmentation: Segmentation) -> list[LabelStatistics]:
    """Measures each label, or each mask as a whole where masks overlap."""
    labels, names = segmentation.labels, segmentation.names
    if not segmentation.has_masks:
        return label_statistics(volume, labels, names)
    rows = []
    for region in range(labels.shape[-1]):
        label = region + 1
        mask = labels[..., region].astype(np.min_scalar_type(label)) * label
        rows += label_statistics(volume, mask, {label: names[label]})
    return rows
