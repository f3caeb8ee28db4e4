"""Which cases are trained on, and which are kept for validation."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.dataset import Case, DataError, Dataset

Split = tuple[tuple[Case, ...], tuple[Case, ...]]


def split_dataset(
    dataset: Dataset,
    *,
    val_fraction: float,
    seed: int,
    num_folds: int | None = None,
    fold: int = 0,
    splits: Path | None = None,
) -> Split:
    """Splits the cases of a data set into training and validation cases.

    The first of these decides that applies: a file of splits, a number of folds, a fraction of 0,
    which trains on everything, the validation cases that the data set declares, the fraction.

    Args:
      dataset: the data set.
      val_fraction: share of the cases that is kept for validation.
      seed: seed of the choice.
      num_folds: number of folds of a cross-validation.
      fold: which fold is kept for validation, from 0.
      splits: a file like nnU-Net's splits_final.json.

    Raises:
      DataError: if a part that is needed would be empty, or the file of splits does not fit.
    """
    if splits is not None:
        return _read_splits(dataset, splits, fold)
    if num_folds is not None:
        return _fold(dataset.cases, num_folds, fold, seed)
    if val_fraction and dataset.validation:
        kept = set(dataset.validation)
        return tuple(case for case in dataset.cases if case not in kept), dataset.validation
    return split(dataset.cases, val_fraction, seed)


def split(cases: Sequence[Case], val_fraction: float, seed: int) -> Split:
    """Splits cases into training and validation cases, by their names and a seed alone.

    Args:
      cases: the cases, in any order.
      val_fraction: share of the cases that is kept for validation; 0 keeps none.
      seed: seed of the choice.

    Raises:
      DataError: if a part that is needed would be empty.
    """
    ordered = sorted(cases, key=lambda case: case.name)
    if val_fraction == 0:
        return tuple(ordered), ()
    num_val = round(len(ordered) * val_fraction)
    if not 0 < num_val < len(ordered):
        raise DataError(
            f"val_fraction={val_fraction}: leaves {num_val} of {len(ordered)} cases for "
            "validation; both parts need at least one"
        )
    return _parts(ordered, np.random.default_rng(seed).permutation(len(ordered))[:num_val])


def _fold(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """Keeps one of several folds of nearly equal size; each case is in exactly one of them."""
    ordered = sorted(cases, key=lambda case: case.name)
    if num_folds > len(ordered):
        raise DataError(
            f"--num-folds {num_folds}: must be at most the number of cases, {len(ordered)}"
        )
    folds = np.array_split(np.random.default_rng(seed).permutation(len(ordered)), num_folds)
    return _parts(ordered, folds[fold])


def _parts(ordered: Sequence[Case], chosen: np.ndarray) -> Split:
    kept = set(chosen.tolist())
    train = tuple(case for i, case in enumerate(ordered) if i not in kept)
    return train, tuple(case for i, case in enumerate(ordered) if i in kept)


def _read_splits(dataset: Dataset, path: Path, fold: int) -> Split:
    """Reads one of the splits `[{"train": [name, ...], "val": [name, ...]}, ...]` of a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"--splits {path}: not readable as JSON ({error})") from None
    if not isinstance(content, list) or not 0 <= fold < len(content):
        raise DataError(
            f"--splits {path}: must be a list of splits; it has no number {fold}, the --fold"
        )
    cases = {case.name: case for case in dataset.cases}
    parts = []
    for part in ("train", "val"):
        names = content[fold].get(part) if isinstance(content[fold], dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"--splits {path}: split {fold}: {part}: must be a list of case names")
        if unknown := [name for name in names if name not in cases]:
            raise DataError(
                f"--splits {path}: split {fold}: {part}: {unknown[0]} is no case of the data set, "
                f"whose first is {next(iter(cases))}"
            )
        parts.append(tuple(cases[name] for name in sorted(set(names))))
    if not parts[0]:
        raise DataError(f"--splits {path}: split {fold}: train: must name at least one case")
    if both := sorted({case.name for case in parts[0]} & {case.name for case in parts[1]}):
        raise DataError(f"--splits {path}: split {fold}: {both[0]} is both in train and in val")
    return parts[0], parts[1]
