"""Names of labels, from JSON files in the forms that are common in the field."""

import json
from pathlib import Path
from typing import Any

from unetr_flax.evaluation.scores import LARGEST_LABEL
from unetr_flax.imaging.volume import VolumeError

FILE_NAME = "labels.json"
FORMS = 'must be a list of names, {"id": name} or {"name": id}'


def read_label_names(path: Path) -> dict[int, str]:
    """Reads the names of labels.

    Args:
      path: a JSON file with a list of names, background first; with {"id": name}; or with
        {"name": id}. An object with such a value under "labels" is taken for that value, so a
        `dataset.json` of the Decathlon or of nnU-Net is read, too.

    Returns:
      Names by id, in ascending order, without the background.

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
    names = _by_id(content)
    if names is None:
        raise VolumeError(f"{path}: {FORMS}")
    return {i: names[i] for i in sorted(names) if i != 0}


def names_beside(*paths: Path) -> dict[int, str]:
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
    return {}


def _by_id(content: Any) -> dict[int, str] | None:
    """Returns names by id; None if the content has another form or an id occurs twice."""
    if isinstance(content, list):
        pairs = list(enumerate(content))
    elif isinstance(content, dict):
        by_id = all(isinstance(value, str) for value in content.values())
        pairs = [(key, value) if by_id else (value, key) for key, value in content.items()]
    else:
        return None
    names = {}
    for key, name in pairs:
        number = _id(key)
        if number is None or number in names or not isinstance(name, str):
            return None
        names[number] = name
    return names


def _id(value: Any) -> int | None:
    """Returns an id that JSON holds as a number or as text; None if the value is no id."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 6:
        value = int(value)
    # In Python True is an integer.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_LABEL:
        return None
    return value
