"""A data set in memory: its cases, what its images show, and what its labels mean."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from unetr_flax.imaging.scan import SCAN_ENDINGS

# The id in label maps of voxels that nobody has labeled, unless the data set declares another one
# or uses this one for a class. It is PyTorch's, MONAI's and Cityscapes' convention.
IGNORED_ID = 255


class DataError(ValueError):
    """A data set that cannot be trained on; the message is one line that names the file."""


class BadCasesError(ValueError):
    """Files that cannot be trained on, one line each."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One labeled image.

    Attributes:
      name: name that no other case of the data set has.
      images: one file with all channels, or one file per channel.
      label: path of the label map.
    """

    name: str
    images: tuple[Path, ...]
    label: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case."""
        return (*self.images, self.label)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The content of a data set, whatever its layout on disk.

    Attributes:
      name: name of the data set.
      modalities: name of each channel of the images, such as "CT" or "MRI".
      labels: names of the background and of the foreground: the classes by their ids, or the
        regions in their order.
      cases: the labeled cases, ordered by name.
      validation: the cases that the data set itself keeps for validation; empty if it has none.
      target: what a label map holds: "classes", one class id per voxel; "regions", class ids that
        belong to overlapping regions; "masks", one channel of 0 and 1 per region.
      regions: for the target "regions", the class ids of each region in the order of `labels[1:]`.
      unused_ids: for the target "regions", declared class ids that are in no region; their voxels
        are background.
      ignored_id: id of voxels that count neither in the loss nor in scores; None if there is none.
      regions_class_order: class id that each region is painted with to turn regions back into a
        label map, as nnU-Net declares; empty if none is declared.
      allow_grid_mismatch: whether a label map that is not on the grid of its image is taken voxel
        by voxel.
    """

    name: str
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    cases: tuple[Case, ...]
    validation: tuple[Case, ...] = ()
    target: Literal["classes", "regions", "masks"] = "classes"
    regions: tuple[tuple[int, ...], ...] = ()
    unused_ids: tuple[int, ...] = ()
    ignored_id: int | None = IGNORED_ID
    regions_class_order: tuple[int, ...] = ()
    allow_grid_mismatch: bool = False

    @property
    def has_regions(self) -> bool:
        """Whether foreground structures may overlap, so that each is predicted by itself."""
        return self.target != "classes"

    @property
    def num_outputs(self) -> int:
        """Channels of the model's logits: classes with the background, or regions without one."""
        return len(self.labels) - self.has_regions


def make_cases(source: Path, files: Sequence[tuple[Sequence[Path], Path]]) -> tuple[Case, ...]:
    """Makes cases of their files, ordered by name.

    A case is named after its first image file, without the ending. Where two cases would have the
    same name, all are named after their paths relative to the folder of the data set.

    Args:
      source: the JSON file that lists the cases, in the folder of the data set.
      files: image files and label file of each case.

    Raises:
      DataError: if an image is listed twice.
    """
    firsts = [images[0] for images, _ in files]
    if repeated := sorted({first for first in firsts if firsts.count(first) > 1}):
        raise DataError(f"{source}: {repeated[0]} is listed {firsts.count(repeated[0])} times")
    paths = [Path(os.path.relpath(first, source.parent)).as_posix() for first in firsts]
    for names in ([strip_ending(p.name) for p in firsts], [strip_ending(p) for p in paths], paths):
        if len(set(names)) == len(names):
            break
    cases = [
        Case(name, tuple(images), label) for name, (images, label) in zip(names, files, strict=True)
    ]
    return tuple(sorted(cases, key=lambda case: case.name))


def strip_ending(name: str) -> str:
    """Removes the ending that the name of a volume's file has."""
    ending = max((e for e in SCAN_ENDINGS if name.lower().endswith(e)), key=len, default="")
    return name[: len(name) - len(ending)]
