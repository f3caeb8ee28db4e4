"""Scans as arrays: files, the canonical grid, and what is done to a scan before the model."""

from unetr_flax.imaging.case_files import CaseFiles, find_cases
from unetr_flax.imaging.file_grid import FileGrid
from unetr_flax.imaging.intensity import Percentiles, Window, ZScore
from unetr_flax.imaging.model_grid import ModelGrid
from unetr_flax.imaging.nifti import read_labels, read_volume, write_labels
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.imaging.scan import Scan, read_scan
from unetr_flax.imaging.volume import Volume, VolumeError

__all__ = [
    "CaseFiles",
    "FileGrid",
    "ModelGrid",
    "Percentiles",
    "Preprocessing",
    "Scan",
    "Volume",
    "VolumeError",
    "Window",
    "ZScore",
    "find_cases",
    "read_labels",
    "read_scan",
    "read_volume",
    "write_labels",
]
