"""The results of an evaluation, as JSON and as CSV."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping

from unetr_flax.evaluation.bootstrap import CONFIDENCE
from unetr_flax.evaluation.scores import METRICS, Scores
from unetr_flax.evaluation.structures import Regions
from unetr_flax.evaluation.summary import Empty, Estimate, Summary
from unetr_flax.imaging.volume import escape


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of an evaluation.

    Attributes:
      names: names of the labels by id, in ascending order.
      cases: scores by case and label id; each case has every label.
      summary: means over cases.
      tolerance: of the surface Dice, in mm.
      empty: how a structure that neither map has is counted.
      resamples: number of bootstrap draws.
      seed: seed of the draws.
      regions: class ids of each region by name; None if the labels are classes.
      ignored: id of the voxels of true label maps that count in no score, if there is one.
      not_scored: ids that occur, but were not among the labels to score.
      failed: what is wrong with each case that could not be evaluated, by case.
      only_predictions: names of predictions without a label map.
      only_labels: names of label maps without a prediction.
    """

    names: dict[int, str]
    cases: dict[str, dict[int, Scores]]
    summary: Summary
    tolerance: float
    empty: Empty
    resamples: int
    seed: int
    regions: Regions | None = None
    ignored: int | None = None
    not_scored: list[int] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    only_predictions: list[str] = dataclasses.field(default_factory=list)
    only_labels: list[str] = dataclasses.field(default_factory=list)


def to_json(report: Report) -> str:
    """Formats a report as JSON; infinity is the text "inf", and what is not defined is null."""
    labels = {
        str(i): {
            "name": report.names[i],
            "cases": label.cases,
            **label.outcomes,
            **_estimates(label.estimates),
        }
        for i, label in report.summary.labels.items()
    }
    content = {
        "tolerance_mm": report.tolerance,
        "empty": report.empty,
        "ignored_label": report.ignored,
        "bootstrap": {
            "confidence": CONFIDENCE,
            "resamples": report.resamples,
            "seed": report.seed,
        },
        "labels": labels,
        "mean_over_labels": _estimates(report.summary.over_labels),
        "cases": {
            escape(name): {str(i): _case_row(scores) for i, scores in case.items()}
            for name, case in report.cases.items()
        },
        "not_scored": report.not_scored,
        "failed": {escape(name): escape(why) for name, why in report.failed.items()},
        "only_in_predictions": [escape(name) for name in report.only_predictions],
        "only_in_labels": [escape(name) for name in report.only_labels],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(report: Report) -> str:
    """Formats the scores as CSV, one line per case and label; infinity is "inf"."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [metric.name + _suffix(metric.unit) for metric in METRICS]
    head = ["case", "label", "name", "outcome", "prediction_ml", "label_ml"]
    writer.writerow([*head, *columns])
    for name, case in report.cases.items():
        for i, scores in case.items():
            values = _case_row(scores)
            writer.writerow([escape(name), i, report.names[i], *values.values()])
    return text.getvalue()


def _case_row(scores: Scores) -> dict[str, float | str | None]:
    return {
        "outcome": scores.outcome,
        "prediction_ml": scores.prediction_ml,
        "label_ml": scores.label_ml,
        **{m.name + _suffix(m.unit): _number(getattr(scores, m.name)) for m in METRICS},
    }


def _estimates(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | str | None]]:
    return {
        metric.name + _suffix(metric.unit): {
            field: _number(value) for field, value in estimates[metric.name]._asdict().items()
        }
        for metric in METRICS
    }


def _suffix(unit: str) -> str:
    return f"_{unit}" if unit else ""


def _number(value: float) -> float | str | None:
    """Converts to what JSON can hold."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
