"""Known causes of differences, as data: for each kind of module its definition and its mistakes."""

from unetr_flax.parity.causes.activation import ACTIVATION, LOGITS, RESIDUAL_END
from unetr_flax.parity.causes.attention import ATTENTION
from unetr_flax.parity.causes.convolution import CONVOLUTION, DECONVOLUTION, PATCHES
from unetr_flax.parity.causes.embedding import POSITIONS
from unetr_flax.parity.causes.explain import Definition
from unetr_flax.parity.causes.image import IMAGE
from unetr_flax.parity.causes.joins import CONCATENATION, DIRECT, FEATURES, MIDDLE, STREAM
from unetr_flax.parity.causes.linear import LINEAR, PROJECTION, QKV
from unetr_flax.parity.causes.norm import CHANNEL_NORM, LAYER_NORM
from unetr_flax.parity.causes.training import (
    ADAM_STEP,
    AVERAGE_STEP,
    LOSS,
    RUNNING_STATISTICS,
    SGD_STEP,
)
from unetr_flax.parity.causes.value import GRADIENT, VALUE

DEFINITIONS: dict[str, Definition] = {
    "image": IMAGE,
    "patches": PATCHES,
    "positions": POSITIONS,
    "layer_norm": LAYER_NORM,
    "direct": DIRECT,
    "qkv": QKV,
    "attention": ATTENTION,
    "projection": PROJECTION,
    "middle": MIDDLE,
    "linear": LINEAR,
    "activation": ACTIVATION,
    "stream": STREAM,
    "features": FEATURES,
    "convolution": CONVOLUTION,
    "deconvolution": DECONVOLUTION,
    "channel_norm": CHANNEL_NORM,
    "residual_end": RESIDUAL_END,
    "concatenation": CONCATENATION,
    "logits": LOGITS,
    "running_statistics": RUNNING_STATISTICS,
    "value": VALUE,
    "gradient": GRADIENT,
    "loss": LOSS,
    "adam_step": ADAM_STEP,
    "sgd_step": SGD_STEP,
    "average_step": AVERAGE_STEP,
}
