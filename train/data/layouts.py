"""Recognizes the layout of a data set on disk and reads it.

A layout is a file of its own: `decathlon.py` (with MONAI's data lists), `nnunet.py` and
`plain_folders.py`. Layouts that are not read are recognized here, to say what to do.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.data.cases import with_masks
from train.data.dataset import DataError, Dataset
from train.data.decathlon import read_decathlon
from train.data.nnunet import read_nnunet
from train.data.plain_folders import find_plain_folders, read_plain_folders

READ = "dataset.json of the Decathlon or of nnU-Net v2, a MONAI data list, or images/ and labels/"


def read_dataset(source: Path, modalities: tuple[str, ...] | None = None) -> Dataset:
    """Reads a data set in any of the layouts.

    Args:
      source: a folder, or a JSON file that lists cases.
      modalities: names of the channels; those that the data set declares if None.

    Raises:
      DataError: if there is no data set or none that is understood.
    """
    source = Path(source)
    path = _json_file(source)
    if path is None:
        folders = find_plain_folders(source)
        if folders is None:
            raise DataError(_neighbor(source))
        return with_masks(read_plain_folders(source, folders, modalities))
    content = _read_json(path)
    if "channel_names" in content:
        return with_masks(read_nnunet(path, content, modalities))
    if "training" not in content and "labels" not in content:
        raise DataError(f'{path}: lists no cases under "training"; --data must hold {READ}')
    return with_masks(read_decathlon(path, content, modalities))


def _json_file(source: Path) -> Path | None:
    """Finds the JSON file that describes a data set: the source itself, dataset.json, or a list."""
    if source.suffix == ".json" and not source.is_dir():
        return source
    path = source / "dataset.json"
    if path.exists():
        return path
    # MONAI's data lists have names such as dataset_0.json.
    lists = sorted(source.glob("dataset_*.json"))
    lists = [path for path in lists if path.name not in _FILES_OF_OTHERS]
    if len(lists) > 1:
        names = ", ".join(path.name for path in lists)
        raise DataError(f"{source}: has several data lists, {names}; --data must name one of them")
    return lists[0] if lists else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a JSON object")
    return content


_FILES_OF_OTHERS = {"dataset_fingerprint.json", "dataset_description.json"}


def _any(pattern: str) -> Callable[[Path], bool]:
    return lambda folder: next(folder.glob(pattern), None) is not None


# What to look for in a folder, what it then is, and what to do.
_NEIGHBORS: tuple[tuple[Callable[[Path], bool], str], ...] = (
    (
        _any("dataset_fingerprint.json"),
        "is preprocessed by nnU-Net; give the raw folder of the data set, below nnUNet_raw",
    ),
    (_any("Dataset[0-9][0-9][0-9]_*/"), "holds several data sets of nnU-Net; give one of them"),
    (_any("Task[0-9][0-9]*_*/"), "holds several tasks of the Decathlon; give one of them"),
    (
        _any("dataset_description.json"),
        "is a BIDS data set; write a dataset.json that lists its images and label maps under "
        '"training", with paths relative to it',
    ),
    (
        _any("*/segmentations/*.nii.gz"),
        "has one mask per structure as TotalSegmentator's data do; join those of each case into "
        "one label map and put them into images/ and labels/",
    ),
    (
        _any("*/imaging.nii.gz"),
        "is in the layout of KiTS; write a dataset.json that lists */imaging.nii.gz and "
        '*/segmentation.nii.gz under "training"',
    ),
    (
        lambda folder: _any("*/*_seg.nii.gz")(folder) or _any("*/*-seg.nii.gz")(folder),
        "is in the layout of BraTS; write a dataset.json that lists the files of each patient "
        'under "training", "image" as a list of one file per channel',
    ),
    (
        lambda folder: (folder / "imagesTr").is_dir() or (folder / "images").is_dir(),
        "has images but no folder of label maps beside them: labelsTr/ or labels/",
    ),
    (
        lambda folder: _any("*.dcm")(folder) or _any("*/*.dcm")(folder),
        "holds DICOM files; convert images and segmentations to NIfTI, into images/ and labels/",
    ),
    (_any("*.nii.gz"), "holds volumes without an order; put them into images/ and labels/"),
)


def _neighbor(source: Path) -> str:
    """Says in one line why a folder is not read, and what to do."""
    if not source.exists():
        return f"{source}: no such folder; --data must hold {READ}"
    if not source.is_dir():
        return f"{source}: is a file; --data must be a folder with {READ}"
    for found, advice in _NEIGHBORS:
        if found(source):
            return f"{source}: {advice}"
    return f"{source}: holds no data set; --data must hold {READ}"
