"""Evaluation of files: one case, or a folder of them, from disk to a report."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from unetr_flax.evaluation.label_names import LabelNames, names_beside
from unetr_flax.evaluation.pairs import Matches, Pair, match_files, read_pair
from unetr_flax.evaluation.report import Report
from unetr_flax.evaluation.scores import Scores, check_tolerance
from unetr_flax.evaluation.structures import Regions, score_structures
from unetr_flax.evaluation.summary import Empty, check_resamples, summarize
from unetr_flax.imaging.volume import VolumeError
from unetr_flax.viewing.labels import name_of

# One case is read while another one is scored.
CASES_AT_ONCE = 2


def evaluate_files(
    predictions: Path | str,
    labels: Path | str,
    *,
    names: Mapping[int, str] | None = None,
    regions: Regions | None = None,
    ignored: int | None = None,
    tolerance: float = 1.0,
    empty: Empty = "agree",
    resamples: int = 10_000,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Scores label maps in NIfTI files, or 4D files of masks, against the true ones.

    Args:
      predictions: predicted label map or masks; or a folder of them, searched with its subfolders.
      labels: true label map; or a folder of them, matched by relative names without the ending.
      names: names by id of the labels to score; if None what a `labels.json` beside the predictions
        or the label maps declares: its regions, or all labels that occur in any case, with its
        names, but for the ignored one.
      regions: regions to score instead of classes, with the class ids that each is made of; files
        of masks have one for each region, in this order. Excludes names.
      ignored: id of voxels of true label maps that count in no score.
      tolerance: largest distance in mm that the surface Dice counts as agreement.
      empty: whether a structure that neither map has counts as an agreement, or is left out.
      resamples: number of bootstrap draws.
      seed: seed of the draws.
      progress: called after each case with the number of cases that are done and that of all.

    Returns:
      Scores and means. A case of a folder that cannot be scored is in `failed`.

    Raises:
      VolumeError: if nothing matches; if no label occurs; if a file of names is broken; if the only
        case, or every case of a folder, cannot be scored.
      ValueError: if tolerance or resamples have no such value.
    """
    check_tolerance(tolerance)
    check_resamples(resamples)
    if names is not None and regions is not None:
        raise ValueError("regions: excludes names")
    predictions, labels = Path(predictions), Path(labels)
    matches = match_files(predictions, labels)
    beside = LabelNames()
    if names is None and regions is None:
        beside = names_beside(predictions, labels)
        regions = beside.regions
        ignored = beside.ignored if ignored is None else ignored
    if regions is not None:
        names = dict(enumerate(regions, 1))
    ids = None if names is None else set(names) - {0, ignored}
    scored, occurring, failed = _score(matches, ids, regions, ignored, tolerance, progress)
    if not scored:
        why = next(iter(failed.values()))
        if len(failed) == 1:
            raise VolumeError(why)
        raise VolumeError(f"none of {len(failed)} cases could be scored; the first one: {why}")
    if names is None or ids is None:
        names, ids = beside.names, occurring
    if not ids:
        raise VolumeError(f"{predictions}, {labels}: no label to score, only background")
    shown = {i: name_of(i, names) for i in sorted(ids)}
    cases = {
        name: {i: scores.get(i, Scores.both_empty()) for i in shown}
        for name, scores in scored.items()
    }
    summary = summarize(list(cases.values()), shown, empty=empty, resamples=resamples, seed=seed)
    return Report(
        names=shown,
        cases=cases,
        summary=summary,
        tolerance=tolerance,
        empty=empty,
        resamples=resamples,
        seed=seed,
        regions=regions,
        ignored=ignored,
        not_scored=sorted(occurring - ids),
        failed=failed,
        only_predictions=matches.only_predictions,
        only_labels=matches.only_labels,
    )


def _score(
    matches: Matches,
    ids: set[int] | None,
    regions: Regions | None,
    ignored: int | None,
    tolerance: float,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, dict[int, Scores]], set[int], dict[str, str]]:
    """Scores cases, some at once.

    Returns:
      Scores by case, in the order of the matches; all ids that occur; what is wrong with each other
      case.
    """
    scored, failed, occurring = {}, {}, set()
    names = [pair.name for pair in matches.pairs]
    with ThreadPoolExecutor(CASES_AT_ONCE) as pool:
        futures = {
            pool.submit(_case, pair, ids, regions, ignored, tolerance): pair.name
            for pair in matches.pairs
        }
        try:
            for done, future in enumerate(as_completed(futures), 1):
                name = futures[future]
                try:
                    scored[name], found = future.result()
                    occurring |= found
                except (ValueError, OSError, MemoryError) as error:
                    failed[name] = str(error) or type(error).__name__
                progress(done, len(futures))
        except BaseException:
            # Ctrl-C ends the cases that have begun and no more.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    in_order = [{n: part[n] for n in names if n in part} for part in (scored, failed)]
    return in_order[0], occurring, in_order[1]


def _case(
    pair: Pair,
    ids: set[int] | None,
    regions: Regions | None,
    ignored: int | None,
    tolerance: float,
) -> tuple[dict[int, Scores], set[int]]:
    """Returns the scores of one case, and the ids that occur in it, without the background."""
    maps = read_pair(pair, ignored)
    try:
        scores = score_structures(pair, maps, ids, regions, tolerance)
    except VolumeError:
        raise
    except ValueError as error:
        raise VolumeError(f"{pair.prediction}, {pair.label}: {error}") from None
    if ids is None or regions is not None:
        return scores, set(scores)
    return scores, _occurring(maps.prediction) | _occurring(maps.label)


def _occurring(classes: np.ndarray) -> set[int]:
    """Returns the ids of a map without the background, or the numbers of all masks."""
    if classes.ndim == 4:
        return set(range(1, classes.shape[3] + 1))
    present = np.zeros(int(classes.max()) + 1, bool)
    for plane in classes:
        present[plane] = True
    return set(np.flatnonzero(present).tolist()) - {0}
