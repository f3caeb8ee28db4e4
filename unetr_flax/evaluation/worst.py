"""Pictures of the cases with the lowest scores. Needs matplotlib."""

import math
from pathlib import Path

import numpy as np

from unetr_flax.evaluation.comparison import Comparison, draw_comparison
from unetr_flax.evaluation.pairs import MapPair, Pair, find_images, match_files, read_pair
from unetr_flax.evaluation.report import Report
from unetr_flax.evaluation.structures import painted
from unetr_flax.evaluation.summary import case_mean
from unetr_flax.imaging.alignment import check_aligned
from unetr_flax.imaging.scan import read_scan
from unetr_flax.imaging.volume import VolumeError, escape
from unetr_flax.runtime.atomic import write_bytes

# Scores of this many labels stand in the title of a picture, the lowest first.
LABELS_IN_TITLE = 4
# Bytes of a case's name that stand in the name of its picture; file systems count no letters.
LONGEST_NAME = 120


def write_worst(
    report: Report,
    number: int,
    folder: Path,
    predictions: Path,
    labels: Path,
    images: Path | None,
) -> list[str]:
    """Draws the cases with the lowest mean Dice over labels, one PNG each.

    Ignored voxels are drawn as background, and later regions over earlier ones.
    Pictures are named worst_01_CASE.png and so on; those of an earlier run in the folder go.

    Args:
      report: the evaluation of `predictions` and `labels`.
      number: number of cases to draw.
      folder: folder of the pictures, which is made if it is missing.
      predictions: as for `evaluate_files`.
      labels: as for `evaluate_files`.
      images: folder of scans with the names of the cases; with two files, the scan; None if only
        labels are shown.

    Returns:
      A line for each scan that cannot be shown, or one that says that no case has a mean.

    Raises:
      VolumeError: if `images` is missing, or a label map cannot be read any more.
      OSError: if the pictures cannot be written.
    """
    cases = worst_cases(report, number)
    pairs = {pair.name: pair for pair in match_files(predictions, labels).pairs}
    scans: dict[str, Path] = {}
    if images is not None:
        single = not predictions.is_dir() and not images.is_dir()
        scans = dict.fromkeys(cases, images) if single else find_images(images, cases)
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("worst_[0-9][0-9]*_*.png"):
        earlier.unlink()
    complaints = []
    if not cases:
        complaints.append(f"{folder}: no picture, as all structures are empty in all cases")
    for rank, name in enumerate(cases, 1):
        pair, image = pairs[name], None
        maps = read_pair(pair, report.ignored)
        maps = maps._replace(
            prediction=painted(pair.prediction, maps.prediction, report.regions),
            label=painted(pair.label, maps.label, report.regions),
        )
        if images is not None:
            try:
                image = _read_image(scans.get(name), images, pair, maps)
            except VolumeError as error:
                complaints.append(f"{escape(str(error))}; drawn without the scan")
        picture = draw_comparison(
            Comparison(
                _title(report, rank, name), maps.prediction, maps.label, maps.spacing, image
            ),
            {i: escape(label) for i, label in report.names.items()},
        )
        end = escape(name).replace("/", "_").encode()[-LONGEST_NAME:]
        # A letter that is cut goes.
        file = end.decode(errors="ignore")
        write_bytes(folder / f"worst_{rank:02}_{file}.png", picture)
    return complaints


def worst_cases(report: Report, number: int) -> list[str]:
    """Returns the names of the cases with the lowest mean Dice over labels, the lowest first."""
    means = {
        name: case_mean(case, report.names, "dice", report.empty)
        for name, case in report.cases.items()
    }
    judged = [name for name, mean in means.items() if not math.isnan(mean)]
    return sorted(judged, key=lambda name: (means[name], name))[:number]


def _read_image(path: Path | None, images: Path, pair: Pair, maps: MapPair) -> np.ndarray:
    """Reads the first channel of a scan, [X, Y, Z], on the canonical grid of the true label map."""
    if path is None:
        raise VolumeError(f"{images}: no scan named {pair.name} or {pair.name}_0000")
    scan = read_scan(path)
    grid = check_aligned(path, scan.grid, pair.label, maps.grid, "a scan and its label map")
    image = np.empty(grid.canonical_shape, np.float32)
    grid.view_on_file_axes(image)[...] = scan.grid.view_on_file_axes(scan.volume.array[..., 0])
    return image


def _title(report: Report, rank: int, name: str) -> str:
    """Returns the name and the Dice of a case, and those of its labels."""
    case = report.cases[name]
    mean = case_mean(case, report.names, "dice", report.empty)
    lowest = sorted(case, key=lambda i: case[i].dice)[:LABELS_IN_TITLE]
    labels = ", ".join(f"{escape(report.names[i])} {case[i].dice:.3f}" for i in lowest)
    more = ", ..." if len(case) > LABELS_IN_TITLE else ""
    return f"{rank}. {escape(name)}: mean Dice {mean:.3f}\n{labels}{more}"
