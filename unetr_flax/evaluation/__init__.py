"""Measures of how well a segmentation agrees with the true labels."""

from unetr_flax.evaluation.dice import DiceCounts, DiceScores
from unetr_flax.evaluation.files import evaluate_files
from unetr_flax.evaluation.report import Report
from unetr_flax.evaluation.scores import Scores, evaluate_case
from unetr_flax.evaluation.summary import Estimate, LabelSummary, Summary, summarize
from unetr_flax.evaluation.surface_distance import SurfaceDistances

__all__ = [
    "DiceCounts",
    "DiceScores",
    "Estimate",
    "LabelSummary",
    "Report",
    "Scores",
    "Summary",
    "SurfaceDistances",
    "evaluate_case",
    "evaluate_files",
    "summarize",
]
