"""Pairs of predicted and true label maps: which files belong together, and what they hold."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unetr_flax.imaging.alignment import check_aligned
from unetr_flax.imaging.file_grid import NIFTI_ENDINGS, FileGrid
from unetr_flax.imaging.label_map import read_whole_numbers
from unetr_flax.imaging.nifti import open_labels
from unetr_flax.imaging.scan import SCAN_ENDINGS
from unetr_flax.imaging.volume import VolumeError, voxel_ml


class Pair(NamedTuple):
    """The files of one case.

    Attributes:
      name: name of the case: its path within the folder, without the ending.
      prediction: predicted label map.
      label: true label map.
    """

    name: str
    prediction: Path
    label: Path


class Matches(NamedTuple):
    """What two folders have in common.

    Attributes:
      pairs: cases in both, by name.
      only_predictions: names of predictions without a label map.
      only_labels: names of label maps without a prediction.
    """

    pairs: list[Pair]
    only_predictions: list[str]
    only_labels: list[str]


class MapPair(NamedTuple):
    """The label maps of one case, on the canonical grid of the true one.

    Attributes:
      prediction: predicted class ids [X, Y, Z], or masks of structures [X, Y, Z, R], int32.
      label: true class ids or masks.
      grid: the grid of the true label map's file.
    """

    prediction: np.ndarray
    label: np.ndarray
    grid: FileGrid

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between neighboring voxels along each axis, in mm."""
        affine = self.grid.canonical_affine
        return tuple(float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml."""
        return voxel_ml(self.grid.canonical_affine)


def match_files(predictions: Path, labels: Path) -> Matches:
    """Matches two files, or the files of two folders by their relative names.

    Args:
      predictions: file, or folder, which is searched with its subfolders for .nii and .nii.gz.
      labels: file if `predictions` is one, else folder.

    Raises:
      VolumeError: if one is missing; if only one is a folder; if a folder has two files of one
        name; if no name is in both.
    """
    for path in (predictions, labels):
        if not path.exists():
            raise VolumeError(f"{path}: no such file or folder")
    if predictions.is_dir() != labels.is_dir():
        folder, file = (predictions, labels) if predictions.is_dir() else (labels, predictions)
        raise VolumeError(f"{folder}: is a folder and {file} is a file, must be two of a kind")
    if not predictions.is_dir():
        return Matches([Pair(_stem(predictions.name), predictions, labels)], [], [])
    found, true = find_files(predictions), find_files(labels)
    pairs = [Pair(name, found[name], true[name]) for name in sorted(found.keys() & true.keys())]
    if not pairs:
        raise VolumeError(
            f"{predictions}: {_count(found)}, none with the name of one of the "
            f"{_count(true)} in {labels}"
        )
    return Matches(pairs, sorted(found.keys() - true.keys()), sorted(true.keys() - found.keys()))


def find_files(folder: Path, endings: tuple[str, ...] = NIFTI_ENDINGS) -> dict[str, Path]:
    """Finds files in a folder and its subfolders, by relative name without the ending.

    Names that start with a dot are passed over; links to folders are followed, each folder once.

    Args:
      folder: the folder.
      endings: what the names of the files end in.

    Raises:
      VolumeError: if two files have the same name, or a folder cannot be read.
    """
    found: dict[str, Path] = {}
    seen = set()
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in files:
            if file.startswith(".") or not file.lower().endswith(endings):
                continue
            path = Path(parent, file)
            name = path.relative_to(folder).with_name(_stem(file, endings)).as_posix()
            if name in found:
                raise VolumeError(f"{path}: has the name of {found[name]}, must be one per case")
            found[name] = path
    return found


def _raise(error: OSError) -> None:
    raise VolumeError(f"{error.filename}: cannot be read ({error.strerror})")


def find_images(folder: Path, names: Collection[str]) -> dict[str, Path]:
    """Finds the scans of cases: files named as the case, or as its first channel, NAME_0000.

    Raises:
      VolumeError: if the folder is missing or has two scans of one name.
    """
    if not folder.is_dir():
        raise VolumeError(f"{folder}: no such folder")
    found = find_files(folder, SCAN_ENDINGS)
    by_case = {name: found.get(name, found.get(f"{name}_0000")) for name in names}
    return {name: path for name, path in by_case.items() if path is not None}


def read_pair(pair: Pair, ignored: int | None = None) -> MapPair:
    """Reads the label maps of a case.

    Args:
      pair: their files.
      ignored: id of voxels of the true label map that are background in both, as is what the
        prediction has with this id; masks have no such voxels.

    Raises:
      VolumeError: if one cannot be read, or if their grids differ.
    """
    files = [open_labels(path) for path in (pair.prediction, pair.label)]
    true_grid = files[1].grid
    grid = check_aligned(
        pair.prediction, files[0].grid, pair.label, true_grid, "the label maps of a case"
    )
    prediction, label = (
        array[..., 0] if array.shape[3] == 1 else array
        for array in map(read_whole_numbers, files, (grid, true_grid))
    )
    if ignored is not None and label.ndim == 3:
        prediction[label == ignored] = 0
        for array in (prediction, label):
            if array.ndim == 3:
                array[array == ignored] = 0
    return MapPair(prediction, label, true_grid)


def _stem(name: str, endings: tuple[str, ...] = NIFTI_ENDINGS) -> str:
    """Returns a file name without its ending."""
    for ending in endings:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def _count(files: Collection) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"
