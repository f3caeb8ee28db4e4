"""Files of `unetr_torch_ref.UNETR`, the article's model."""

import fractions
from collections.abc import Sequence
from typing import Any

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights import layouts
from unetr_flax.weights.families import conv_decoder
from unetr_flax.weights.families.registry import Family, TorchModel
from unetr_flax.weights.families.shapes import Shapes, image_size
from unetr_flax.weights.tables import (
    LAYER_NORM,
    LINEAR,
    POSITIONS,
    PROJECTION,
    Table,
    bias,
    weight,
)

TABLE = Table(
    rows=(
        ("embedding", "encoder/embedding", "embedding"),
        ("transformer.layers.{layer}.0.norm", "encoder/block_{layer}/norm1", "norm"),
        ("transformer.layers.{layer}.0.fn", "encoder/block_{layer}/attention", "attention"),
        ("transformer.layers.{layer}.1.norm", "encoder/block_{layer}/norm2", "norm"),
        ("transformer.layers.{layer}.1.fn", "encoder/block_{layer}/feed_forward", "feed_forward"),
        *conv_decoder.DECODER_ROWS,
    ),
    parts={
        "embedding": (("patch_embeddings", "projection", "conv"),),
        "attention": (("qkv", "qkv", "qkv"), ("projection", "projection", "projection")),
        "feed_forward": (("0", "expand", "linear"), ("3", "contract", "linear")),
        **conv_decoder.DECODER_PARTS,
    },
    arrays={
        "embedding": (POSITIONS,),
        "qkv": (weight("kernel", layouts.QKV_WEIGHT), bias(layouts.QKV_BIAS)),
        "projection": PROJECTION,
        "linear": LINEAR,
        "norm": LAYER_NORM,
        **conv_decoder.DECODER_ARRAYS,
    },
)


def _config(
    shapes: Shapes,
    *,
    num_heads: int,
    img_size: Sequence[int] | None,
    skip_layers: Sequence[int] | None,
    dropout_rate: float,
) -> UNETRConfig:
    rank = conv_decoder.spatial_rank(shapes)
    patches = shapes.axes("embedding.patch_embeddings.weight", rank + 2)
    hidden_size, in_channels, *patch_size = patches
    _, tokens, _ = shapes.axes("embedding.position_embeddings", 3)
    num_layers = shapes.count(r"transformer\.layers\.(\d+)\.0\.norm\.weight")
    return UNETRConfig.reference(
        img_size=image_size(img_size, patch_size, tokens),
        in_channels=in_channels,
        out_channels=conv_decoder.out_channels(shapes),
        light_r=_light_r(conv_decoder.decoder_width(shapes)),
        patch_size=tuple(patch_size),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_dim=shapes["transformer.layers.0.1.fn.0.weight"][0],
        skip_layers=conv_decoder.skip_layers(skip_layers, num_layers),
        dropout_rate=dropout_rate,
    )


def _light_r(width: int) -> Any:
    # The exact divisor, since a float could truncate to a width one below.
    return fractions.Fraction(64, width)


def _torch_model(cfg: UNETRConfig) -> Any:
    from unetr_torch_ref import UNETR

    return UNETR(**conv_decoder.torch_arguments(cfg), light_r=_light_r(cfg.channels[0]))


REFERENCE = Family(
    name="reference",
    signature="transformer.layers.",
    table=lambda cfg: TABLE,
    config=_config,
    default_num_heads=8,
    options=("skip_layers",),
    torch_model=TorchModel(
        make=_torch_model,
        package="unetr_torch_ref",
        install="'unetr-flax[torch]'",
        encoder="transformer",
        stages=conv_decoder.STAGES,
        qkv="(h d qkv)",
        attention_dropout="att_drop",
    ),
)
