"""Means over cases of each label's scores, with their bootstrap intervals."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

import numpy as np

from unetr_flax.evaluation.bootstrap import bootstrap_means, interval, weighted_means
from unetr_flax.evaluation.scores import METRICS, Outcome, Scores

Empty = Literal["agree", "skip"]


class Estimate(NamedTuple):
    """A mean over cases, and how far other cases could have moved it.

    Attributes:
      mean: the mean; infinite if any value is; nan if there is no value.
      low: lower end of the 95 % bootstrap interval; nan with fewer than two values.
      high: upper end.
      median: the middle value; nan with fewer than two values, and for means over labels.
    """

    mean: float
    low: float
    high: float
    median: float


@dataclasses.dataclass(frozen=True)
class LabelSummary:
    """The scores of one label over all cases.

    Attributes:
      cases: number of cases that the means are over.
      outcomes: number of cases in which the structure was found, empty, missed and invented.
      estimates: the mean of each metric, by its name.
    """

    cases: int
    outcomes: dict[Outcome, int]
    estimates: dict[str, Estimate]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The scores of all labels over all cases.

    Attributes:
      labels: the summary of each label, by its id.
      over_labels: mean over labels of their means, by metric; a label without a value is left out.
    """

    labels: dict[int, LabelSummary]
    over_labels: dict[str, Estimate]


def summarize(
    cases: Collection[Mapping[int, Scores]],
    ids: Collection[int],
    *,
    empty: Empty = "agree",
    resamples: int = 10_000,
    seed: int = 0,
) -> Summary:
    """Computes each label's means over cases.

    Args:
      cases: the scores of each case by label id; an id that is not there is in neither map.
      ids: label ids to summarize.
      empty: whether a case in which neither prediction nor label has the structure counts as an
        agreement ("agree") or is left out of that label's means ("skip").
      resamples: number of bootstrap draws; the draws are of cases, the same for all labels.
      seed: seed of the draws.

    Raises:
      ValueError: if there is no case or no id, or `resamples` is not positive.
    """
    for name, given in (("cases", cases), ("ids", ids)):
        if not given:
            raise ValueError(f"{name}: none given, must be at least one")
    check_resamples(resamples)
    ids = sorted(ids)
    scores = [[case.get(i, Scores.both_empty()) for i in ids] for case in cases]
    values = np.array([[_row(one, empty) for one in case] for case in scores])
    values = values.reshape(len(scores), len(ids), len(METRICS))
    means = weighted_means(_flat(values), np.ones((1, len(scores))))[0]
    drawn = bootstrap_means(_flat(values), resamples, seed)
    low, high = (end.reshape(len(ids), -1) for end in interval(drawn))
    means = means.reshape(len(ids), -1)
    number = (~np.isnan(values[:, :, 0])).sum(0)
    labels = {}
    for k, label in enumerate(ids):
        known = number[k] > 1
        labels[label] = LabelSummary(
            cases=int(number[k]),
            outcomes={
                outcome: sum(case[k].outcome == outcome for case in scores)
                for outcome in ("found", "empty", "missed", "invented")
            },
            estimates={
                metric.name: Estimate(
                    mean=float(means[k, m]),
                    low=float(low[k, m]) if known else float("nan"),
                    high=float(high[k, m]) if known else float("nan"),
                    median=_median(values[:, k, m]) if known else float("nan"),
                )
                for m, metric in enumerate(METRICS)
            },
        )
    drawn = drawn.reshape(resamples, len(ids), len(METRICS))
    return Summary(labels, _over_labels(means, drawn, len(scores)))


def check_resamples(resamples: int) -> None:
    """Refuses a number of bootstrap draws below 1.

    Raises:
      ValueError: if it is.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: must be at least 1")


def case_mean(case: Mapping[int, Scores], ids: Collection[int], metric: str, empty: Empty) -> float:
    """Computes the mean of a metric over the labels of one case; nan if all are left out."""
    scores = (case.get(i, Scores.both_empty()) for i in ids)
    values = [getattr(one, metric) for one in scores if empty == "agree" or one.outcome != "empty"]
    return float(np.mean(values)) if values else float("nan")


def _row(scores: Scores, empty: Empty) -> list[float]:
    if empty == "skip" and scores.outcome == "empty":
        return [float("nan")] * len(METRICS)
    return [getattr(scores, metric.name) for metric in METRICS]


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _median(values: np.ndarray) -> float:
    """Returns the median of the values that are not nan."""
    present = np.sort(values[~np.isnan(values)])
    if not len(present):
        return float("nan")
    # The mean of the two in the middle: `np.median` makes nan of two that are infinite.
    return float(present[(len(present) - 1) // 2] + present[len(present) // 2]) / 2


def _over_labels(means: np.ndarray, drawn: np.ndarray, cases: int) -> dict[str, Estimate]:
    """Averages the labels' means, and those of each draw.

    Args:
      means: [labels, metrics].
      drawn: [resamples, labels, metrics].
      cases: number of cases.
    """
    estimates = {}
    for m, metric in enumerate(METRICS):
        ones = np.ones((1, len(means)))
        mean = weighted_means(means[:, m : m + 1], ones)[0, 0]
        low, high = interval(weighted_means(drawn[:, :, m].T, ones).T)
        known = cases > 1
        estimates[metric.name] = Estimate(
            mean=float(mean),
            low=float(low[0]) if known else float("nan"),
            high=float(high[0]) if known else float("nan"),
            median=float("nan"),
        )
    return estimates
