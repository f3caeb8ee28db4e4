"""The raw layout of nnU-Net version 2 (Isensee et al. 2021).

dataset.json has `channel_names`, `labels` and `file_ending`; channel c of a case is in
`imagesTr/CASE_000c.ENDING` and its label map in `labelsTr/CASE.ENDING`. See nnU-Net's
documentation/dataset_format.md.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.data.dataset import Case, DataError, Dataset
from train.data.label_names import parse_channels, parse_labels
from unetr_flax.imaging.scan import SCAN_ENDINGS


def read_nnunet(
    path: Path, content: Mapping[str, Any], modalities: tuple[str, ...] | None
) -> Dataset:
    """Reads a raw data set of nnU-Net version 2.

    Args:
      path: dataset.json.
      content: what it holds.
      modalities: names of the channels; those of the file if None.

    Raises:
      DataError: if dataset.json has fields of another form, or images and labels do not match.
    """
    channels = parse_channels(content.get("channel_names"), "channel_names", path)
    ending = content.get("file_ending", ".nii.gz")
    if ending not in SCAN_ENDINGS:
        raise DataError(
            f"{path}: file_ending: {ending!r}, must be one of {', '.join(SCAN_ENDINGS)}; convert "
            "the images and labels"
        )
    listed = content.get("dataset")
    cases = (
        _listed_cases(path, listed)
        if isinstance(listed, Mapping)
        else _cases_of_folders(path.parent, len(channels), ending)
    )
    if not cases:
        raise DataError(f"{path.parent / 'labelsTr'}: no files that end in {ending}")
    return Dataset(
        name=str(content.get("name", path.parent.name)),
        modalities=modalities or channels,
        **parse_labels(content.get("labels"), path, content.get("regions_class_order")).fields(),
        cases=tuple(sorted(cases, key=lambda case: case.name)),
    )


def _cases_of_folders(folder: Path, channels: int, ending: str) -> list[Case]:
    """Lists the cases that imagesTr or labelsTr has; missing files are found on reading."""
    images = {
        found[1]
        for name in _names(folder / "imagesTr", ending)
        if (found := re.fullmatch(r"(.+)_\d{4}", name, re.DOTALL))
    }
    labels = set(_names(folder / "labelsTr", ending))
    return [
        Case(
            name,
            tuple(folder / "imagesTr" / f"{name}_{i:04d}{ending}" for i in range(channels)),
            folder / "labelsTr" / f"{name}{ending}",
        )
        for name in images | labels
    ]


def _listed_cases(path: Path, listed: Mapping[str, Any]) -> list[Case]:
    """Reads the field "dataset": `{case: {"images": [file, ...], "label": file}}`."""
    cases = []
    for name, entry in listed.items():
        images = entry.get("images") if isinstance(entry, Mapping) else None
        if not isinstance(images, list) or not images or "label" not in entry:
            raise DataError(f'{path}: dataset: {name}: must have "images", a list, and "label"')
        files = tuple(path.parent / str(image) for image in images)
        cases.append(Case(str(name), files, path.parent / str(entry["label"])))
    return cases


def _names(folder: Path, ending: str) -> list[str]:
    """Lists the names of files in a folder without their ending; hidden files are passed over."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; nnU-Net's raw layout has it")
    names = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    return [name.removesuffix(ending) for name in names if name.endswith(ending)]
