"""How the model's operations are lowered on CPU, GPU and TPU; nothing else knows."""

from unetr_flax.ops.conv import conv_general_dilated
from unetr_flax.ops.linear import dot_general
from unetr_flax.ops.norm import normalize
from unetr_flax.ops.upsample import ConvTranspose

__all__ = ["ConvTranspose", "conv_general_dilated", "dot_general", "normalize"]
