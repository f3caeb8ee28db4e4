"""Folders `images` and `labels` with files of equal names, and no JSON file.

`images/a.nii.gz` belongs to `labels/a.nii.gz`; the files of several channels are
`images/a_0000.nii.gz`, `images/a_0001.nii.gz`. Both may have one folder per patient below. The
classes are the ids that the label maps hold, unless a `labels.json` names them.
"""

import json
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train.data.dataset import IGNORED_ID, Case, DataError, Dataset, strip_ending
from train.data.label_names import Labels, parse_labels
from unetr_flax.imaging.label_map import read_label_ids
from unetr_flax.imaging.scan import SCAN_ENDINGS
from unetr_flax.imaging.volume import VolumeError

FOLDERS = (("images", "labels"), ("images", "masks"), ("imagesTr", "labelsTr"))
LARGEST_ID = 254

_CHANNEL = re.compile(r"(.+)_(\d{4})", re.DOTALL)


def find_plain_folders(folder: Path) -> tuple[Path, Path] | None:
    """Finds the folders of images and label maps in a folder; None if there are none."""
    for images, labels in FOLDERS:
        if (folder / images).is_dir() and (folder / labels).is_dir():
            return folder / images, folder / labels
    return None


def read_plain_folders(
    folder: Path, folders: tuple[Path, Path], modalities: tuple[str, ...] | None
) -> Dataset:
    """Reads a data set of two folders.

    Args:
      folder: the folder of the data set.
      folders: the folders of images and of label maps.
      modalities: names of the channels.

    Raises:
      DataError: if `modalities` is None, files do not match, or label maps cannot be read.
    """
    if modalities is None:
        raise DataError(
            f"{folder}: has no JSON file that says what its images are; add --modalities CT, or "
            "--modalities MRI, or one name per channel"
        )
    images, labels = _volumes(folders[0]), _volumes(folders[1])
    channels = _by_case(images) if len(modalities) > 1 or not images.keys() & labels else {}
    cases = []
    for name, label in sorted(labels.items()):
        files = channels.get(name) or [images.get(name)]
        if None in files:
            raise DataError(f"{label}: there is no image {folders[0] / name}.* for this label map")
        cases.append(Case(name, tuple(path for path in files if path is not None), label))
    used = {path for case in cases for path in case.images}
    if unused := sorted(set(images.values()) - used):
        raise DataError(f"{unused[0]}: there is no label map in {folders[1]} for this image")
    if not cases:
        raise DataError(f"{folders[1]}: no label maps; looked for {', '.join(SCAN_ENDINGS)}")
    return Dataset(
        name=folder.resolve().name,
        modalities=modalities,
        **_labels(folder, cases).fields(),
        cases=tuple(cases),
    )


def _volumes(folder: Path) -> dict[str, Path]:
    """Finds the volumes below a folder by their relative paths without endings."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name.startswith(".") or (stem := strip_ending(name)) == name:
            continue
        if stem in found:
            raise DataError(f"{path} and {found[stem]}: two files with the same name")
        found[stem] = path
    return found


def _by_case(images: dict[str, Path]) -> dict[str, list[Path]]:
    """Groups the files of channels by case, in the order of their numbers."""
    groups = defaultdict(list)
    for name, path in sorted(images.items()):
        if found := _CHANNEL.fullmatch(name):
            groups[found[1]].append(path)
    return groups


def _labels(folder: Path, cases: list[Case]) -> Labels:
    path = folder / "labels.json"
    if path.exists():
        try:
            return parse_labels(json.loads(path.read_text(encoding="utf-8")), path)
        except (ValueError, OSError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: not readable as JSON ({error})") from None
    try:
        with ThreadPoolExecutor(2) as pool:
            ids = set().union(*pool.map(read_label_ids, [case.label for case in cases]))
    except VolumeError as error:
        raise DataError(str(error)) from None
    ids -= {0, IGNORED_ID}
    if not ids:
        raise DataError(
            f"{folder}: its label maps hold no id but 0 and {IGNORED_ID}, which marks voxels that "
            "do not count; classes must be numbered from 1"
        )
    if not 0 < min(ids) <= max(ids) <= LARGEST_ID:
        raise DataError(
            f"{folder}: its label maps hold ids from {min(ids)} to {max(ids)}, must be 0 to "
            f"{LARGEST_ID}; a labels.json names others"
        )
    return Labels(("background", *(f"label {i}" for i in range(1, max(ids) + 1))))
