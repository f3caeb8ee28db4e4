"""How the model's operations are lowered on CPU, GPU and TPU; nothing else knows."""

from unetr_flax.ops.attention import attention_weights, dot_product_attention, weighted_values
from unetr_flax.ops.conv import Conv
from unetr_flax.ops.conv_transpose import ConvTranspose
from unetr_flax.ops.features import (
    Features,
    Normalized,
    channels,
    deferred_norm,
    joined,
    rank,
)
from unetr_flax.ops.linear import dot_general
from unetr_flax.ops.norm import normalize
from unetr_flax.ops.once import gradient_once
from unetr_flax.ops.platform import in_program, traced_for
from unetr_flax.ops.residual import residual
from unetr_flax.ops.sums import global_norm

__all__ = [
    "Conv",
    "ConvTranspose",
    "Features",
    "Normalized",
    "attention_weights",
    "channels",
    "deferred_norm",
    "dot_general",
    "dot_product_attention",
    "global_norm",
    "gradient_once",
    "in_program",
    "joined",
    "normalize",
    "rank",
    "residual",
    "traced_for",
    "weighted_values",
]
