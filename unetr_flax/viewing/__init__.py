"""What a person looks at after a segmentation: a table, a picture, and an interactive page."""

from unetr_flax.viewing.page import write_page
from unetr_flax.viewing.preview import write_preview
from unetr_flax.viewing.statistics import LabelStatistics, label_statistics, print_table, to_json

__all__ = [
    "LabelStatistics",
    "label_statistics",
    "print_table",
    "to_json",
    "write_page",
    "write_preview",
]
