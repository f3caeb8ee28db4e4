"""UNETR for volumetric segmentation in JAX/Flax, proven equal to PyTorch."""

from unetr_flax.config import UNETRConfig
from unetr_flax.inference import sliding_window_inference
from unetr_flax.unetr import UNETR

__all__ = ["UNETR", "UNETRConfig", "sliding_window_inference"]
