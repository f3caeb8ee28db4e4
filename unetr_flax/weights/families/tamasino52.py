"""Files of github.com/tamasino52/UNETR, the model of `unetr_torch_ref.Tamasino52UNETR`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights import layouts
from unetr_flax.weights.families import conv_decoder
from unetr_flax.weights.families.identities import identity_norm
from unetr_flax.weights.families.registry import Family, TorchModel
from unetr_flax.weights.families.shapes import Shapes, image_size
from unetr_flax.weights.tables import LAYER_NORM, LINEAR, POSITIONS, PROJECTION, Table

QKV = ("query", "key", "value")

TABLE = Table(
    rows=(
        ("transformer.embeddings", "encoder/embedding", "embedding"),
        ("transformer.layer.{layer}.attention_norm", "encoder/block_{layer}/norm1", "norm"),
        ("transformer.layer.{layer}.attn", "encoder/block_{layer}/attention", "attention"),
        ("transformer.layer.{layer}.mlp_norm", "encoder/block_{layer}/norm2", "norm"),
        ("transformer.layer.{layer}.mlp", "encoder/block_{layer}/feed_forward", "feed_forward"),
        *conv_decoder.DECODER_ROWS,
    ),
    parts={
        "embedding": (("patch_embeddings", "projection", "conv"),),
        "attention": (("out", "projection", "projection"),),
        "feed_forward": (("w_1", "expand", "linear"), ("w_2", "contract", "linear")),
        **conv_decoder.DECODER_PARTS,
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
    patches = shapes.axes("transformer.embeddings.patch_embeddings.weight", rank + 2)
    hidden_size, in_channels, *patch_size = patches
    _, tokens, _ = shapes.axes("transformer.embeddings.position_embeddings", 3)
    num_layers = shapes.count(r"transformer\.layer\.(\d+)\.mlp_norm\.weight")
    return UNETRConfig.tamasino52(
        img_size=image_size(img_size, patch_size, tokens),
        in_channels=in_channels,
        out_channels=conv_decoder.out_channels(shapes),
        patch_size=tuple(patch_size),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_dim=shapes["transformer.layer.0.mlp.w_1.weight"][0],
        skip_layers=conv_decoder.skip_layers(skip_layers, num_layers),
        width=conv_decoder.decoder_width(shapes),
        dropout_rate=dropout_rate,
    )


def _unused_keys(cfg: UNETRConfig, version: str | None) -> dict[str, np.ndarray]:
    return identity_norm("transformer.encoder_norm", cfg.hidden_size)


def _torch_model(cfg: UNETRConfig) -> Any:
    from unetr_torch_ref import Tamasino52UNETR

    return Tamasino52UNETR(**conv_decoder.torch_arguments(cfg), channels=cfg.channels[0])


TAMASINO52 = Family(
    name="tamasino52",
    signature="transformer.layer.",
    table=lambda cfg: TABLE,
    config=_config,
    default_num_heads=12,
    options=("skip_layers",),
    torch_model=TorchModel(
        make=_torch_model,
        package="unetr_torch_ref",
        install="'unetr-flax[torch]'",
        encoder="transformer",
        stages=conv_decoder.STAGES,
        qkv=QKV,
        attention_dropout="attn_dropout",
    ),
    unused_keys=_unused_keys,
)
