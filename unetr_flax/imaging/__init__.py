"""Scans as arrays: files, the canonical grid, and what is done to a scan before the model."""

from unetr_flax.imaging.intensity import Percentiles, Window, ZScore
from unetr_flax.imaging.model_grid import ModelGrid
from unetr_flax.imaging.nifti import read_labels, read_volume, write_labels
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.imaging.volume import Volume, VolumeError

__all__ = [
    "ModelGrid",
    "Percentiles",
    "Preprocessing",
    "Volume",
    "VolumeError",
    "Window",
    "ZScore",
    "read_labels",
    "read_volume",
    "write_labels",
]
