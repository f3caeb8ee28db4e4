"""How the model's operations are lowered on CPU, GPU and TPU; nothing else knows."""

from unetr_flax.ops._all import ConvTranspose, conv_general_dilated, dot_general
from unetr_flax.ops.norm import normalize

__all__ = ["ConvTranspose", "conv_general_dilated", "dot_general", "normalize"]
