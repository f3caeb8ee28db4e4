"""Labels that JSON files declare in the forms that are common in the field: names, ids, regions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from unetr_flax.evaluation.scores import LARGEST_LABEL
from unetr_flax.imaging.volume import VolumeError

FILE_NAME = "labels.json"
FORMS = 'labels must be a list of names, {"id": name} or {"name": id or ids}'
IGNORE_NAME = "ignore"

# The name of each label, and its id, or the ids of a region.
Declared = list[tuple[str, int | tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class LabelNames:
    """The labels to score.

    Attributes:
      names: names by id, in ascending order, without the background and the ignored label; those of
        regions by their numbers from 1.
      regions: class ids of each region by name; None if the labels are classes.
      ignored: id of the voxels of a true label map that count in no score; None if there is none.
    """

    names: dict[int, str] = dataclasses.field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] | None = None
    ignored: int | None = None


def read_label_names(path: Path) -> LabelNames:
    """Reads the names of labels.

    Args:
      path: a JSON file with a list of names, background first; with {"id": name}; or with
        {"name": id}, where a list of ids makes all labels regions. An object with such a value
        under "labels" is taken for that value, so a `dataset.json` of the Decathlon or of nnU-Net
        is read, too.

    Raises:
      VolumeError: if the file cannot be read or has another form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VolumeError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise VolumeError(f"{path}: not a JSON file") from None
    if isinstance(content, dict) and isinstance(content.get("labels"), list | dict):
        content = content["labels"]
    try:
        declared, ignored = parse_declared(content)
        if any(isinstance(ids, tuple) for _, ids in declared):
            regions = _regions(declared)
            return LabelNames(dict(enumerate(regions, 1)), regions, ignored)
        return LabelNames(_names(declared), None, ignored)
    except ValueError as error:
        raise VolumeError(f"{path}: {error}") from None


def names_beside(*paths: Path) -> LabelNames:
    """Reads the names that `unetr predict` wrote with the first of some folders or files.

    They are in `labels.json` in a folder, and for one file `NAME.nii.gz` in `NAME.labels.json` or
    in `labels.json` beside it.

    Raises:
      VolumeError: if the file cannot be read or has another form.
    """
    for path in paths:
        if path.is_dir():
            files = [path / FILE_NAME]
        else:
            name = path.name.removesuffix(".gz").removesuffix(".nii")
            files = [path.with_name(f"{name}.{FILE_NAME}"), path.with_name(FILE_NAME)]
        for file in files:
            if file.is_file():
                return read_label_names(file)
    return LabelNames()


def parse_declared(content: Any) -> tuple[Declared, int | None]:
    """Parses a list of names, {"id": name}, or {"name": id or ids of a region}.

    Returns:
      All labels but the one named "ignore", in the given order; and the id of that one, whose
      voxels do not count, None if there is none.

    Raises:
      ValueError: if the content has another form.
    """
    if isinstance(content, list):
        pairs = [(name, key) for key, name in enumerate(content)]
    elif isinstance(content, dict):
        by_id = all(isinstance(value, str) for value in content.values())
        pairs = [(value, key) if by_id else (key, value) for key, value in content.items()]
    else:
        raise ValueError(FORMS)
    declared: Declared = []
    ignored = None
    for name, value in pairs:
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is no name; {FORMS}")
        ids = _ids(name, value)
        if name.lower() != IGNORE_NAME:
            declared.append((name, ids))
        elif isinstance(ids, tuple):
            raise ValueError(f"{name}: must be one id, not {value}")
        else:
            ignored = ids
    if ignored is not None and ignored in [ids for _, ids in declared]:
        raise ValueError(f"{IGNORE_NAME}: has the id {ignored} of another label")
    return declared, ignored


def _names(declared: Declared) -> dict[int, str]:
    """Returns the names of classes by id."""
    names = {ids: name for name, ids in declared if isinstance(ids, int)}
    if len(names) < len(declared):
        raise ValueError(f"an id has two names; {FORMS}")
    return {i: names[i] for i in sorted(names) if i != 0}


def _regions(declared: Declared) -> dict[str, tuple[int, ...]]:
    """Returns the class ids of regions by name, without the background."""
    regions = {name: ids if isinstance(ids, tuple) else (ids,) for name, ids in declared}
    return {name: ids for name, ids in regions.items() if ids != (0,)}


def _ids(name: str, value: Any) -> int | tuple[int, ...]:
    """Returns the id of a class, or the ids of a region."""
    ids = [_id(item) for item in value] if isinstance(value, list) else [_id(value)]
    found = tuple(i for i in ids if i is not None)
    if not found or len(found) < len(ids):
        raise ValueError(
            f"{name}: must be an id or a list of ids from 0 to {LARGEST_LABEL}, not {value!r}; "
            f"{FORMS}"
        )
    return found if isinstance(value, list) else found[0]


def _id(value: Any) -> int | None:
    """Returns an id that JSON holds as a number or as text; None if the value is no id."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 6:
        value = int(value)
    # In Python True is an integer.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_LABEL:
        return None
    return value
