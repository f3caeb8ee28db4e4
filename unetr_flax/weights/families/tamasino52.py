"""The names of github.com/tamasino52/UNETR, `unetr_torch_ref.Tamasino52UNETR`."""

from unetr_flax.weights import layouts
from unetr_flax.weights.families.reference import DECODER_ARRAYS, DECODER_PARTS, DECODER_ROWS
from unetr_flax.weights.tables import LAYER_NORM, LINEAR, POSITIONS, PROJECTION, Table

QKV = ("query", "key", "value")

TAMASINO52 = Table(
    rows=(
        ("transformer.embeddings", "encoder/embedding", "embedding"),
        ("transformer.layer.{layer}.attention_norm", "encoder/block_{layer}/norm1", "norm"),
        ("transformer.layer.{layer}.attn", "encoder/block_{layer}/attention", "attention"),
        ("transformer.layer.{layer}.mlp_norm", "encoder/block_{layer}/norm2", "norm"),
        ("transformer.layer.{layer}.mlp", "encoder/block_{layer}/feed_forward", "feed_forward"),
        *DECODER_ROWS,
    ),
    parts={
        "embedding": (("patch_embeddings", "projection", "conv"),),
        "attention": (("out", "projection", "projection"),),
        "feed_forward": (("w_1", "expand", "linear"), ("w_2", "contract", "linear")),
        **DECODER_PARTS,
    },
    arrays={
        "embedding": (POSITIONS,),
        "attention": (
            (
                tuple(f"{name}.weight" for name in QKV),
                "params",
                "qkv/kernel",
                layouts.QKV_STACKED_WEIGHT,
            ),
            (tuple(f"{name}.bias" for name in QKV), "params", "qkv/bias", layouts.QKV_STACKED_BIAS),
        ),
        "projection": PROJECTION,
        "linear": LINEAR,
        "norm": LAYER_NORM,
        **DECODER_ARRAYS,
    },
)
