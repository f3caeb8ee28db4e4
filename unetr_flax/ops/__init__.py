"""How the model's operations are lowered on CPU, GPU and TPU; nothing else knows."""

from unetr_flax.ops.attention import attention_weights, dot_product_attention, weighted_values
from unetr_flax.ops.conv import conv_general_dilated
from unetr_flax.ops.linear import dot_general
from unetr_flax.ops.norm import normalize
from unetr_flax.ops.upsample import ConvTranspose

__all__ = [
    "ConvTranspose",
    "attention_weights",
    "conv_general_dilated",
    "dot_general",
    "dot_product_attention",
    "normalize",
    "weighted_values",
]
