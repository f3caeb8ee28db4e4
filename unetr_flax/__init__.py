"""UNETR for volumetric segmentation in JAX/Flax, proven equal to PyTorch."""

from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.inference.sliding_window import sliding_window_inference
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.unetr import UNETR

__all__ = ["UNETR", "Preprocessing", "UNETRConfig", "sliding_window_inference"]
