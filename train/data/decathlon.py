"""The layout of the Medical Segmentation Decathlon (Antonelli et al. 2022), and MONAI's data lists.

Both are a JSON file that lists images and label maps under "training". In MONAI's lists an image
may also be a list of one file per channel, and cases under "validation" are kept for validation.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.data.dataset import DataError, Dataset, make_cases, strip_ending
from train.data.label_names import parse_channels, parse_labels


def read_decathlon(
    path: Path, content: Mapping[str, Any], modalities: tuple[str, ...] | None
) -> Dataset:
    """Reads the JSON file of a data set with a list of its cases.

    Args:
      path: the JSON file; the files of cases are relative to its folder.
      content: what it holds.
      modalities: names of the channels; those of the file if None.

    Raises:
      DataError: if the file lacks cases, modalities or labels, or has them in another form.
    """
    training = _list(content, ("training",), path)
    validation = _list(content, ("validation", "val"), path)
    if not training:
        raise DataError(f"{path}: training: must list at least one case")
    _refuse_nnunet_v1(path, training[0][0][0])
    cases = make_cases(path, training + validation)
    kept = {images[0] for images, _ in validation}
    return Dataset(
        name=str(content.get("name", path.parent.name)),
        modalities=modalities or parse_channels(content.get("modality"), "modality", path),
        **parse_labels(content.get("labels"), path).fields(),
        cases=cases,
        validation=tuple(case for case in cases if case.images[0] in kept),
    )


def _refuse_nnunet_v1(path: Path, image: Path) -> None:
    """Raises DataError if the listed names lack the numbers of channels that the files have."""
    stem = strip_ending(image.name)
    numbered = image.with_name(f"{stem}_0000{image.name[len(stem) :]}")
    if not image.exists() and numbered.exists():
        raise DataError(
            f"{path}: is in the layout of nnU-Net version 1, whose names of images lack _0000; "
            "convert it with nnUNetv2_convert_old_nnUNet_dataset, or list the files as they are"
        )


def _list(
    content: Mapping[str, Any], fields: tuple[str, ...], path: Path
) -> list[tuple[list[Path], Path]]:
    """Reads the first of some fields that is there: image files and label file of each case."""
    for field in fields:
        if field in content:
            entries = content[field]
            if not isinstance(entries, list):
                raise DataError(f"{path}: {field}: must be a list of cases")
            return [_files(entry, field, path) for entry in entries]
    return []


def _files(entry: Any, field: str, path: Path) -> tuple[list[Path], Path]:
    if not isinstance(entry, Mapping) or not {"image", "label"} <= entry.keys():
        raise DataError(f'{path}: {field}: each case must have "image" and "label", not {entry!r}')
    images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    if not images or not all(isinstance(name, str) for name in (*images, entry["label"])):
        raise DataError(
            f'{path}: {field}: "image" must be a file or a list of files and "label" a file, not '
            f"{entry!r}"
        )
    image_files = [_file(path.parent, image) for image in images]
    return image_files, _file(path.parent, entry["label"])


def _file(folder: Path, name: str) -> Path:
    """Returns the path of a file; different ways to write the same path become equal."""
    return Path(os.path.normpath(folder / name))
