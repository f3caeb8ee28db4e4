"""Data sets in the layout of the Medical Segmentation Decathlon (Antonelli et al. 2022)."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from unetr_flax.imaging.nifti import read_labels, read_volume
from unetr_flax.imaging.volume import Volume, VolumeError

# Affines of one grid differ in the last digits of float32 if different programs wrote them.
AFFINE_TOLERANCE = 1e-3  # mm
READERS = 4

T = TypeVar("T")


class DataError(ValueError):
    """A data set that cannot be trained on; the message names the file."""


class BadCasesError(ValueError):
    """Files that cannot be trained on, one line each."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One labeled image.

    Attributes:
      name: the image's file name without its endings.
      image: path of the image.
      label: path of the label map.
    """

    name: str
    image: Path
    label: Path


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The content of dataset.json.

    Attributes:
      name: name of the data set.
      modalities: name of each channel of the images, such as "CT" or "MRI".
      labels: name of each class by its id; 0 is the background.
      cases: the labeled cases, ordered by name.
    """

    name: str
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    cases: tuple[Case, ...]


def read_dataset(folder: Path) -> Dataset:
    """Reads dataset.json of a folder with images and labels.

    Raises:
      DataError: if the file is missing, is not JSON, or lacks cases, modalities or labels.
    """
    path = Path(folder) / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; --data must be a Decathlon folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a JSON object")
    cases = content.get("training")
    if not isinstance(cases, list) or not cases:
        raise DataError(f"{path}: training: must list at least one case")
    return Dataset(
        name=str(content.get("name", Path(folder).name)),
        modalities=_by_id(content, "modality", path),
        labels=_by_id(content, "labels", path),
        cases=tuple(sorted((_case(entry, path) for entry in cases), key=lambda case: case.name)),
    )


def read_cases(
    dataset: Dataset,
    cases: Sequence[Case],
    use: Callable[[Case, Volume, np.ndarray], T],
    progress: Callable[[int], None] | None = None,
) -> list[T]:
    """Reads and checks cases, and hands over each that is good; every file is read once.

    Args:
      dataset: the data set of the cases.
      cases: which of its cases to read.
      use: called with each good case, its image and its class ids [X, Y, Z], from several threads.
      progress: called with the number of cases done so far.

    Returns:
      The results of `use`, in the order of the cases.

    Raises:
      BadCasesError: after all cases are read, if any is not good; one line per bad file.
    """
    names = [case.name for case in cases]
    problems = [f"{n}: listed {names.count(n)} times in dataset.json" for n in _repeated(names)]
    results: list[T] = []

    def read(case: Case) -> T | BadCasesError:
        try:
            volume, labels = read_case(dataset, case)
        except BadCasesError as error:
            return error
        return use(case, volume, labels)

    with ThreadPoolExecutor(READERS) as pool:
        for done, result in enumerate(pool.map(read, cases), start=1):
            if isinstance(result, BadCasesError):
                problems.append(str(result))
            else:
                results.append(result)
            if progress is not None:
                progress(done)
    if problems:
        raise BadCasesError("\n".join(problems))
    return results


def read_case(dataset: Dataset, case: Case) -> tuple[Volume, np.ndarray]:
    """Reads and checks one case.

    Returns:
      The image; and class ids [X, Y, Z], int32, on the same grid.

    Raises:
      BadCasesError: with all that is wrong, one line per file.
    """
    problems = []
    image = label_map = None
    try:
        image = read_volume(case.image)
    except VolumeError as error:
        problems.append(str(error))
    try:
        label_map = read_labels(case.label)
    except VolumeError as error:
        problems.append(str(error))
    if image is not None and image.array.shape[-1] != len(dataset.modalities):
        problems.append(
            f"{case.image}: {image.array.shape[-1]} channels, dataset.json has "
            f"{len(dataset.modalities)} modalities"
        )
    if label_map is not None:
        problems += _label_problems(dataset, case, image, *label_map)
    if problems or image is None or label_map is None:
        raise BadCasesError("\n".join(problems))
    return image, label_map[0]


def split(
    cases: Sequence[Case], val_fraction: float, seed: int
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Splits cases into training and validation cases, by their names and a seed alone.

    Args:
      cases: the cases, in any order.
      val_fraction: share of the cases that is kept for validation.
      seed: seed of the choice.

    Raises:
      DataError: if either part would be empty.
    """
    ordered = sorted(cases, key=lambda case: case.name)
    num_val = round(len(ordered) * val_fraction)
    if not 0 < num_val < len(ordered):
        raise DataError(
            f"val_fraction={val_fraction}: leaves {num_val} of {len(ordered)} cases for "
            "validation; both parts need at least one"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(ordered))[:num_val].tolist())
    train = tuple(case for i, case in enumerate(ordered) if i not in chosen)
    return train, tuple(case for i, case in enumerate(ordered) if i in chosen)


def _by_id(content: dict, field: str, path: Path) -> tuple[str, ...]:
    """Reads the names of {"0": name, "1": name, ...} in the order of their ids."""
    names = content.get(field)
    if not isinstance(names, dict) or not names:
        raise DataError(f'{path}: {field}: must be an object like {{"0": "name", ...}}')
    expected = {str(i) for i in range(len(names))}
    if names.keys() != expected:
        raise DataError(
            f"{path}: {field}: ids are {sorted(names)}, must be 0 to {len(names) - 1} without gaps"
        )
    return tuple(str(names[str(i)]) for i in range(len(names)))


def _case(entry: object, path: Path) -> Case:
    if not isinstance(entry, dict) or not {"image", "label"} <= entry.keys():
        raise DataError(f'{path}: training: each case must have "image" and "label", not {entry!r}')
    image, label = (path.parent / str(entry[key]) for key in ("image", "label"))
    return Case(image.name.removesuffix(".gz").removesuffix(".nii"), image, label)


def _repeated(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _label_problems(
    dataset: Dataset, case: Case, image: Volume | None, labels: np.ndarray, affine: np.ndarray
) -> list[str]:
    """Lists what is wrong with a label map: its ids, or its grid compared with the image's."""
    unknown = sorted(set(np.unique(labels).tolist()) - set(range(len(dataset.labels))))
    if unknown:
        return [
            f"{case.label}: label ids {unknown}, dataset.json has 0 to {len(dataset.labels) - 1}"
        ]
    if image is None:
        return []
    if labels.shape != image.array.shape[:-1]:
        return [f"{case.label}: shape {labels.shape}, its image has {image.array.shape[:-1]}"]
    if not np.allclose(affine, image.affine, rtol=0, atol=AFFINE_TOLERANCE):
        shift = float(np.abs(affine - image.affine).max())
        return [f"{case.label}: affine differs from its image's by up to {shift:.3g} mm"]
    return []
