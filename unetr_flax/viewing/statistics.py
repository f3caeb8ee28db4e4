"""Measurements of each structure in a segmentation: its size, place and intensities."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

import numpy as np

from unetr_flax.imaging.volume import Volume
from unetr_flax.viewing.cross_sections import CrossSections, row_table
from unetr_flax.viewing.labels import check_labels, name_of


@dataclasses.dataclass(frozen=True)
class LabelStatistics:
    """Measurements of one class in a scan of C channels; None where the class has no voxel.

    Attributes:
      id: class id.
      name: name of the class.
      voxels: number of voxels.
      volume_ml: volume in ml.
      mean: mean intensity per channel.
      std: standard deviation of the intensity per channel (of the population: divided by the
        number of voxels).
      min: lowest intensity per channel.
      max: highest intensity per channel.
      centroid_mm: mean position of the voxels' centers, in mm of the scanner (the affine's).
      bounding_box: first voxel of the smallest box, and one past its last, on the canonical grid.
      touches_border: whether the box reaches an outer face of the scan, where the structure may
        be cut off.
    """

    id: int
    name: str
    voxels: int
    volume_ml: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    min: tuple[float, ...] | None = None
    max: tuple[float, ...] | None = None
    centroid_mm: tuple[float, ...] | None = None
    bounding_box: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    touches_border: bool | None = None


def label_statistics(
    volume: Volume, labels: np.ndarray, names: Mapping[int, str]
) -> list[LabelStatistics]:
    """Measures each class that has a name or a voxel, without the background (class 0).

    Time and memory do not grow with the number of classes: scan and labels are read slice by slice.

    Args:
      volume: the scan, [X, Y, Z, C] on the canonical grid.
      labels: class ids [X, Y, Z] on the same grid, integers from 0 to 65535.
      names: names of classes by id; may name classes that do not occur, or lack some that do.

    Returns:
      Measurements in ascending order of class ids.

    Raises:
      ValueError: if the label map does not fit the scan.
    """
    check_labels(volume, labels)
    sections = CrossSections.of(labels)
    intensities = _intensities(volume.array, labels, sections)
    centroids = sections.centroids @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    found = {}
    for row, (label, box) in enumerate(zip(sections.ids, sections.boxes, strict=True)):
        mean, std, low, high = (_floats(values[row]) for values in intensities)
        voxels = int(sections.voxels[row])
        found[label] = LabelStatistics(
            id=label,
            name=name_of(label, names),
            voxels=voxels,
            volume_ml=voxels * volume.voxel_ml,
            mean=mean,
            std=std,
            min=low,
            max=high,
            centroid_mm=_floats(centroids[row]),
            bounding_box=box,
            touches_border=0 in box[0] or any(np.equal(box[1], labels.shape)),
        )
    absent = {
        label: LabelStatistics(label, name_of(label, names), voxels=0, volume_ml=0.0)
        for label in names.keys() - found.keys() - {0}
    }
    return [row for _, row in sorted((absent | found).items())]


def to_json(statistics: Sequence[LabelStatistics]) -> str:
    """Formats measurements as a JSON list with an object and a line per class."""
    rows = [json.dumps(dataclasses.asdict(row)) for row in statistics]
    return "[" + ",".join(f"\n  {row}" for row in rows) + "\n]\n"


def print_table(statistics: Sequence[LabelStatistics], file: TextIO | None = None) -> None:
    """Prints measurements as a table with one line per class.

    Args:
      statistics: the measurements.
      file: where to print; standard output if None.
    """
    header = ("id", "name", "voxels", "ml", "mean", "std", "min", "max", "centroid (mm)", "border")
    rows = [header, *(_cells(row) for row in statistics)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        # Names are aligned to the left, numbers to the right.
        cells = [
            c.ljust(w) if i == 1 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=file or sys.stdout)


def _cells(row: LabelStatistics) -> tuple[str, ...]:
    return (
        str(row.id),
        row.name,
        str(row.voxels),
        f"{row.volume_ml:.3f}",
        *(_join(value, ".5g") for value in (row.mean, row.std, row.min, row.max)),
        _join(row.centroid_mm, ".1f"),
        {None: "-", True: "yes", False: "no"}[row.touches_border],
    )


def _join(values: tuple[float, ...] | None, form: str) -> str:
    return "-" if values is None else ", ".join(format(value, form) for value in values)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _intensities(
    image: np.ndarray, labels: np.ndarray, sections: CrossSections
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Computes mean, standard deviation, minimum and maximum, each [classes, C], float64."""
    rows, size = row_table(sections.ids), (len(sections.ids), image.shape[-1])
    number = sections.voxels[:, None]
    total, squares = np.zeros(size), np.zeros(size)
    low, high = np.full(size, np.inf), np.full(size, -np.inf)

    def foreground():
        for slab, classes in zip(image, labels, strict=True):
            inside = classes != 0
            yield rows[classes[inside]], slab[inside].astype(np.float64)

    for row, values in foreground():
        for channel in range(size[1]):
            total[:, channel] += np.bincount(row, values[:, channel], size[0])
            np.minimum.at(low[:, channel], row, values[:, channel])
            np.maximum.at(high[:, channel], row, values[:, channel])
    mean = total / number
    # A second pass, since a difference of sums of squares would lose digits.
    for row, values in foreground():
        for channel in range(size[1]):
            deviation = values[:, channel] - mean[row, channel]
            squares[:, channel] += np.bincount(row, deviation**2, size[0])
    return mean, np.sqrt(squares / number), low, high
