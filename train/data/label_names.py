"""The labels that a data set declares: names of classes and regions, and the ignored id."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.dataset import IGNORED_ID, DataError, Dataset
from unetr_flax.evaluation.label_names import parse_declared
from unetr_flax.evaluation.structures import parse_regions

# Words that say of which side a structure is, and those that do so only if both occur.
SIDES = {"left", "right", "lt", "rt", "lh", "rh"}
LETTERS_OF_SIDES = {"l", "r"}

# Between words: all but letters, and where a word begins within camelCase or an LAbbreviation.
_BETWEEN_WORDS = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclasses.dataclass(frozen=True)
class Labels:
    """Declared labels; the fields are those of `Dataset`.

    Attributes:
      labels: names of the background and of all classes or regions.
      regions: class ids of each region; empty if the labels are classes.
      ignored_id: id of voxels that do not count; None if the id 255 is a class.
      regions_class_order: class id that each region is painted with to turn regions back into a
        label map, as nnU-Net declares; empty if none is declared.
    """

    labels: tuple[str, ...]
    regions: tuple[tuple[int, ...], ...] = ()
    ignored_id: int | None = IGNORED_ID
    regions_class_order: tuple[int, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Returns the fields of the data set that the labels decide."""
        target = "regions" if self.regions else "classes"
        return {**vars(self), "target": target}


def parse_labels(content: Any, path: Path, order: Any = None) -> Labels:
    """Parses the field "labels" of a JSON file.

    Both forms in use are read: `{"0": "background", "1": "liver"}` of the Decathlon, and
    `{"background": 0, "liver": 1}` of nnU-Net v2, whose regions are lists of ids and whose label
    named "ignore" marks voxels that do not count.

    Args:
      content: the value of the field.
      path: the JSON file, for messages.
      order: the value of nnU-Net's field "regions_class_order"; None if there is none.

    Raises:
      DataError: if a field has another form, or there is no background or nothing else.
    """
    if not isinstance(content, dict) or not content:
        raise DataError(f'{path}: labels: must be an object like {{"0": "background", ...}}')
    try:
        declared, ignored = parse_declared(content)
    except ValueError as error:
        raise DataError(f"{path}: labels: {error}") from None
    ids = dict(declared)
    if len(ids) < len(declared):
        raise DataError(f"{path}: labels: two ids have the same name")
    ignored_id = IGNORED_ID if ignored is None else ignored
    background = next((name for name, value in ids.items() if value in (0, (0,))), None)
    if background is None:
        raise DataError(
            f"{path}: labels: none has the id 0, which is the background of every label map; add "
            '"0": "background" (and number the others from 1)'
        )
    if len(ids) < 2:
        raise DataError(
            f"{path}: labels: {background!r} with the id 0 is the background, and there is nothing "
            "else to segment; add the other labels, numbered from 1"
        )
    if any(isinstance(value, tuple) for value in ids.values()):
        ids.pop(background)
        regions = tuple(v if isinstance(v, tuple) else (v,) for v in ids.values())
        declared = _class_order(order, len(regions), path)
        return Labels((background, *ids), regions, ignored_id, declared)
    if sorted(ids.values()) != list(range(len(ids))):
        shown = sorted(map(str, ids.values()))
        raise DataError(
            f"{path}: labels: ids are {shown}, must be 0 to {len(ids) - 1} without gaps"
        )
    names = tuple(sorted(ids, key=lambda name: ids[name]))
    return Labels(names, ignored_id=None if ignored_id == IGNORED_ID < len(ids) else ignored_id)


def parse_channels(content: Any, field: str, path: Path) -> tuple[str, ...]:
    """Parses the names of channels, `{"0": name, "1": name, ...}`, in the order of their numbers.

    Raises:
      DataError: if the field has another form.
    """
    if not isinstance(content, Mapping) or not content:
        raise DataError(f'{path}: {field}: must be an object like {{"0": "name", ...}}')
    if content.keys() != {str(i) for i in range(len(content))}:
        raise DataError(
            f"{path}: {field}: ids are {sorted(content)}, must be 0 to {len(content) - 1} without "
            "gaps"
        )
    return tuple(str(content[str(i)]) for i in range(len(content)))


def with_regions(dataset: Dataset, regions: Sequence[str]) -> Dataset:
    """Joins the classes of a data set to regions, which may overlap or leave classes out.

    Args:
      dataset: a data set whose label maps hold classes.
      regions: the regions in the form `NAME=ID,ID,...`, such as `WT=1,2,3` of BraTS.

    Raises:
      ValueError: naming --regions and what is wrong.
    """
    if dataset.has_regions:
        raise ValueError(f"--regions: the data set {dataset.name} has regions of its own")
    named = parse_regions(regions, highest=len(dataset.labels) - 1)
    unused = set(range(1, len(dataset.labels))).difference(*named.values())
    return dataclasses.replace(
        dataset,
        labels=(dataset.labels[0], *named),
        target="regions",
        regions=tuple(named.values()),
        unused_ids=tuple(sorted(unused)),
    )


def find_sided(labels: Sequence[str]) -> str | None:
    """Finds a label that is of the left or right alone by its name; None if there is none.

    Words are runs of letters or parts of camelCase, in whatever case. The words "l" and "r" count
    only if both occur among the labels, since one alone may mean anything.
    """
    words = [{word.lower() for word in _BETWEEN_WORDS.split(label)} for label in labels]
    both = set().union(*words) >= LETTERS_OF_SIDES
    sides = SIDES | LETTERS_OF_SIDES if both else SIDES
    return next((label for label, own in zip(labels, words, strict=True) if own & sides), None)


def _class_order(value: Any, num_regions: int, path: Path) -> tuple[int, ...]:
    """Reads the class id that each region is painted with."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else []
    distinct = {item for item in ids if type(item) is int and item > 0}
    if not len(distinct) == len(ids) == num_regions:
        raise DataError(
            f"{path}: regions_class_order: must be a list of {num_regions} different ids above 0, "
            f"one for each region, not {value!r}"
        )
    return tuple(ids)
