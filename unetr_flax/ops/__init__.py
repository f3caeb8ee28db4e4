"""The model's operations and their lowerings; no other part of the model knows of platforms."""

from unetr_flax.ops.attention.api import attention_is_plain, dot_product_attention
from unetr_flax.ops.attention.xla import attention_weights, weighted_values
from unetr_flax.ops.conv import Conv
from unetr_flax.ops.conv_transpose import ConvTranspose
from unetr_flax.ops.dense import Dense
from unetr_flax.ops.features import concatenate, recompute_sources, recomputed
from unetr_flax.ops.gelu import gelu
from unetr_flax.ops.materialize import add
from unetr_flax.ops.norm.api import normalize
from unetr_flax.ops.norm.residual import add_leaky_relu
from unetr_flax.ops.norm.xla import leaky_relu
from unetr_flax.ops.platform import Lowering, exportable, target_platform
from unetr_flax.ops.recompute import recompute
from unetr_flax.ops.reductions import global_norm
from unetr_flax.ops.sharding import VolumeSharding, sharded_volumes

__all__ = [
    "Conv",
    "ConvTranspose",
    "Dense",
    "Lowering",
    "VolumeSharding",
    "add",
    "add_leaky_relu",
    "attention_is_plain",
    "attention_weights",
    "concatenate",
    "dot_product_attention",
    "exportable",
    "gelu",
    "global_norm",
    "leaky_relu",
    "normalize",
    "recompute",
    "recompute_sources",
    "recomputed",
    "sharded_volumes",
    "target_platform",
    "weighted_values",
]
