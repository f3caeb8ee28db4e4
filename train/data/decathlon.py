"""Data sets in the layout of the Medical Segmentation Decathlon (Antonelli et al. 2022)."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from unetr_flax.imaging.nifti import VolumeError, read_labels, read_volume

# Affines of one grid written by different programs differ in the last digits of float32.
AFFINE_TOLERANCE = 1e-3


class DataError(ValueError):
    """A data set that cannot be trained on; the message names the file."""


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
    """What dataset.json says.

    Attributes:
      name: of the data set.
      modalities: name of each channel of the images, such as "CT" or "MRI".
      labels: name of each class by its id; 0 is the background.
      cases: the labeled cases, by name.
    """

    name: str
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    cases: tuple[Case, ...]


def read_dataset(folder: Path) -> Dataset:
    """Reads dataset.json of a folder with images and labels.

    Raises:
      DataError: if it is missing, not JSON, has no cases, or lacks what is needed of it.
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


def check_cases(dataset: Dataset, progress: Callable[[int], None] | None = None) -> list[str]:
    """Opens every file and returns all that is wrong, one line per file; an empty list is good.

    Args:
      dataset: what to check.
      progress: called with the number of cases done so far.
    """
    names = [case.name for case in dataset.cases]
    problems = [f"{n}: listed {names.count(n)} times in dataset.json" for n in _repeated(names)]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda case: _check(case, dataset), dataset.cases)
        for done, found in enumerate(results, start=1):
            problems += found
            if progress is not None:
                progress(done)
    return problems


def split(
    cases: Sequence[Case], val_fraction: float, seed: int
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Training and validation cases; the same for the same names and seed, in whatever order.

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
    """The names of {"0": name, "1": name, ...} in order."""
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


def _check(case: Case, dataset: Dataset) -> list[str]:
    problems = []
    image = labels = None
    try:
        image = read_volume(case.image)
    except VolumeError as error:
        problems.append(str(error))
    try:
        labels, label_affine = read_labels(case.label)
    except VolumeError as error:
        problems.append(str(error))
    if image is not None and image.array.shape[-1] != len(dataset.modalities):
        problems.append(
            f"{case.image}: {image.array.shape[-1]} channels, dataset.json has "
            f"{len(dataset.modalities)} modalities"
        )
    if labels is not None:
        unknown = sorted(set(np.unique(labels).tolist()) - set(range(len(dataset.labels))))
        if unknown:
            problems.append(
                f"{case.label}: label ids {unknown}, dataset.json has 0 to "
                f"{len(dataset.labels) - 1}"
            )
        elif image is not None and labels.shape != image.array.shape[:-1]:
            problems.append(
                f"{case.label}: shape {labels.shape}, its image has {image.array.shape[:-1]}"
            )
        elif image is not None and not np.allclose(
            label_affine, image.affine, rtol=0, atol=AFFINE_TOLERANCE
        ):
            shift = float(np.abs(label_affine - image.affine).max())
            problems.append(
                f"{case.label}: affine differs from its image's by up to {shift:.3g} mm"
            )
    return problems
