"""How the model's operations are lowered on CPU, GPU and TPU; nothing else knows."""

from unetr_flax.ops.attention.api import attention_weights, dot_product_attention, weighted_values
from unetr_flax.ops.conv import Conv
from unetr_flax.ops.conv_transpose import ConvTranspose
from unetr_flax.ops.features import (
    DeferredNorm,
    Features,
    channels,
    deferred_norm,
    joined,
    rank,
)
from unetr_flax.ops.linear import dot_general
from unetr_flax.ops.materialize import gradient_once
from unetr_flax.ops.norm.api import normalize
from unetr_flax.ops.norm.residual import residual
from unetr_flax.ops.platform import in_program, target_platform
from unetr_flax.ops.reductions import global_norm

__all__ = [
    "Conv",
    "ConvTranspose",
    "DeferredNorm",
    "Features",
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
    "target_platform",
    "weighted_values",
]
