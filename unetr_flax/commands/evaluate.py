"""`unetr evaluate`: predicted label maps against the true ones."""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from unetr_flax.commands.verdict import Verdict
from unetr_flax.imaging.volume import escape

if TYPE_CHECKING:
    from unetr_flax.evaluation.report import Report


@dataclasses.dataclass(frozen=True)
class ScoringOptions:
    """How predictions are judged.

    The scores of a label in a case, for predicted voxels P and true voxels L:

    - Dice: 2 |P n L| / (|P| + |L|)
    - IoU: |P n L| / |P u L|
    - surface Dice: part of both surfaces within --tolerance of the other
    - HD95: 95th percentile of distances, larger of P to L and L to P, mm
    - ASSD: mean of distances over the voxels of both surfaces, mm
    - volume: that of P minus that of L, in ml and in % of L

    A surface is the voxels of which a neighbor along an axis is outside of the structure, as is
    everything beyond the scan. Distances are Euclidean, from the center of each voxel of one
    surface to the closest one of the other.

    A structure in neither map is an agreement (overlaps 1, distances 0), or left out with --empty
    skip. A structure in only one map is never left out: overlaps are 0, and distances are infinite,
    as is their mean. The columns missed (only in L) and invented (only in P) count such cases.

    Means are over cases. Their 95 % intervals are percentiles of the means of cases that are drawn
    anew, with replacement.
    """

    labels: Path | None = None
    """JSON file of the labels to score: a list, {id: name} or {name: id, or ids of a region}; else
    all that occur. Voxels of LABELS with the label named ignore count in no score."""

    regions: tuple[str, ...] | None = None
    """Overlapping regions to score instead of labels, such as WT=1,2,3 TC=2,3 ET=3; 4D files have
    one mask for each, in this order."""

    tolerance: float = 1.0
    """Largest distance in mm that the surface Dice counts as agreement."""

    empty: Literal["agree", "skip"] = "agree"
    """Whether a structure that is in neither map counts as an agreement, or is left out."""

    resamples: int = 10_000
    """Bootstrap draws of the intervals."""

    seed: int = 0
    """Seed of the bootstrap draws."""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What is shown and written."""

    cases: bool = False
    """Print the scores of each case, too."""

    csv: Path | None = None
    """File for the scores, one line per case and label."""

    json: Path | None = None
    """File for scores, means, intervals, and cases that are missing or failed."""

    plot: Path | None = None
    """PNG file for box plots of each label; needs matplotlib."""

    worst: Annotated[tuple[int, Path] | None, tyro.conf.arg(metavar="N DIR")] = None
    """Draw the N cases with the lowest mean Dice, one PNG each, in a folder; needs matplotlib."""

    images: Path | None = None
    """Scan, or folder of scans of any format, named as the cases or CASE_0000, to draw --worst
    on."""

    overwrite: bool = False
    """Replace files that are there already."""


def evaluate(
    predictions: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PREDICTIONS")],
    truth: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LABELS")],
    scoring: ScoringOptions,
    report: ReportOptions,
) -> None:
    """Score predicted label maps against true ones: overlap, surface distances, volume.

    Both are NIfTI files, or folders of them, which are matched by their paths without the ending.
    4D files are masks of structures that may overlap, one after the other.
    The two maps of a case must have the same grid. Without --labels, names of labels are read from
    a labels.json beside PREDICTIONS or LABELS. A case that cannot be scored is told, the others are
    scored still, and the exit status is 1.

    Args:
      predictions: Predicted label map, or a folder of them.
      truth: True label map, or a folder of them.
      report: What is shown and written.
    """
    from unetr_flax.evaluation.files import evaluate_files
    from unetr_flax.evaluation.label_names import read_label_names
    from unetr_flax.evaluation.structures import parse_regions
    from unetr_flax.evaluation.table import case_table, label_table

    _check(report, predictions)
    names = ignored = regions = None
    if scoring.regions is not None:
        if scoring.labels is not None:
            raise ValueError("--regions: excludes --labels")
        regions = parse_regions(scoring.regions)
    elif scoring.labels is not None:
        declared = read_label_names(scoring.labels)
        regions, ignored = declared.regions, declared.ignored
        names = declared.names if regions is None else None
    result = evaluate_files(
        predictions,
        truth,
        names=names,
        regions=regions,
        ignored=ignored,
        tolerance=scoring.tolerance,
        empty=scoring.empty,
        resamples=scoring.resamples,
        seed=scoring.seed,
        progress=_progress,
    )
    if report.cases:
        print(case_table(result), end="\n\n")
    print(label_table(result))
    _tell(result, predictions, truth)
    _write(result, report, predictions, truth)
    if result.failed:
        number = len(result.cases) + len(result.failed)
        raise Verdict(f"{len(result.failed)} of {number} cases could not be scored")


def _check(report: ReportOptions, predictions: Path) -> None:
    """Refuses outputs that cannot be written, and scans that cannot be found, before any work."""
    from unetr_flax.runtime.atomic import check_writable

    for path in (report.csv, report.json, report.plot):
        if path is not None:
            _check_file(path, report.overwrite)
    if report.worst is not None:
        number, folder = report.worst
        if number < 1:
            raise ValueError(f"--worst {number}: must be at least 1")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is a file, must be a folder")
        if not report.overwrite and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder}: is not empty; --overwrite replaces its pictures")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        check_writable(there / "worst.png")
    if report.images is not None:
        if report.worst is None:
            raise ValueError("--images: only with --worst")
        if not report.images.exists():
            raise ValueError(f"{report.images}: no such file or folder")
        if predictions.is_dir() and not report.images.is_dir():
            raise ValueError(
                f"--images {report.images}: is a file, must be a folder as {predictions} is"
            )
        if report.images.is_dir():
            from unetr_flax.evaluation.pairs import find_images

            find_images(report.images, ())
    pictures = report.plot is not None or report.worst is not None
    if pictures and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot and --worst need matplotlib: pip install 'unetr-flax[view]'")


def _check_file(path: Path, overwrite: bool) -> None:
    """Refuses a path that cannot become a file, or is one that may not be replaced."""
    from unetr_flax.runtime.atomic import check_writable

    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder is missing")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, must be a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: is there already; --overwrite replaces it")
    check_writable(path)


def _progress(done: int, total: int) -> None:
    """Shows the number of cases that are done, where somebody can watch it."""
    if total > 1 and sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} cases", end=end, file=sys.stderr, flush=True)


def _tell(result: "Report", predictions: Path, truth: Path) -> None:
    """Says how the table is to be read, and what is not in it."""
    rule = "an agreement" if result.empty == "agree" else "left out"
    print(
        f"\nSurface Dice within {result.tolerance:g} mm; volume: prediction minus label.\n"
        f"A structure that is empty in both maps is {rule}; one that is missed or invented is\n"
        "infinitely far, also in the mean."
    )
    if result.ignored is not None:
        print(f"Voxels whose true label is the ignored one, {result.ignored}, count in no score.")
    lines = []
    if result.not_scored:
        lines.append(f"labels {_some(result.not_scored)}: occur, but are not in --labels")
    for names, there, other in (
        (result.only_predictions, predictions, truth),
        (result.only_labels, truth, predictions),
    ):
        if names:
            some = _some([escape(name) for name in names])
            lines.append(f"{there}: {len(names)} without a match in {other}: {some}")
    lines += [f"{escape(name)}: {escape(why)}" for name, why in result.failed.items()]
    for line in lines:
        print(f"unetr: {line}", file=sys.stderr)


def _some(values: Sequence[object], most: int = 5) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more


def _write(result: "Report", report: ReportOptions, predictions: Path, truth: Path) -> None:
    """Writes the files that were asked for."""
    from unetr_flax.evaluation.report import to_csv, to_json
    from unetr_flax.runtime.atomic import write_bytes, write_text

    if report.csv is not None:
        write_text(report.csv, to_csv(result))
    if report.json is not None:
        write_text(report.json, to_json(result))
    if report.plot is not None:
        from unetr_flax.evaluation.plot import box_plots

        write_bytes(report.plot, box_plots(result))
    if report.worst is not None:
        from unetr_flax.evaluation.worst import write_worst

        number, folder = report.worst
        images = report.images
        for line in write_worst(result, number, folder, predictions, truth, images):
            print(f"unetr: {line}", file=sys.stderr)
    written = (report.csv, report.json, report.plot, report.worst and report.worst[1])
    for path in written:
        if path is not None:
            print(f"{path}: written")
