"""The names of `unetr_torch_ref.UNETR`."""

from unetr_flax.weights import layouts
from unetr_flax.weights.tables import (
    KERNEL_OF_CONV,
    KERNEL_OF_DECONV,
    LAYER_NORM,
    LINEAR,
    POSITIONS,
    PROJECTION,
    SCALE,
    STATISTICS,
    Table,
    bias,
    weight,
)

DECODER_ROWS = (
    ("decoder12_upsampler", "decoder/stage_0/upsample", "single_deconv"),
    ("decoder9", "decoder/stage_0/skip_0", "deconv_block"),
    ("decoder9_upsampler.0", "decoder/stage_0/fuse_0", "conv_block"),
    ("decoder9_upsampler.1", "decoder/stage_0/fuse_1", "conv_block"),
    ("decoder9_upsampler.2", "decoder/stage_0/fuse_2", "conv_block"),
    ("decoder9_upsampler.3", "decoder/stage_1/upsample", "single_deconv"),
    ("decoder6.0", "decoder/stage_1/skip_0", "deconv_block"),
    ("decoder6.1", "decoder/stage_1/skip_1", "deconv_block"),
    ("decoder6_upsampler.0", "decoder/stage_1/fuse_0", "conv_block"),
    ("decoder6_upsampler.1", "decoder/stage_1/fuse_1", "conv_block"),
    ("decoder6_upsampler.2", "decoder/stage_2/upsample", "single_deconv"),
    ("decoder3.0", "decoder/stage_2/skip_0", "deconv_block"),
    ("decoder3.1", "decoder/stage_2/skip_1", "deconv_block"),
    ("decoder3.2", "decoder/stage_2/skip_2", "deconv_block"),
    ("decoder3_upsampler.0", "decoder/stage_2/fuse_0", "conv_block"),
    ("decoder3_upsampler.1", "decoder/stage_2/fuse_1", "conv_block"),
    ("decoder3_upsampler.2", "decoder/stage_3/upsample", "single_deconv"),
    ("decoder0.0", "decoder/stage_3/skip_0", "conv_block"),
    ("decoder0.1", "decoder/stage_3/skip_1", "conv_block"),
    ("decoder0_header.0", "decoder/stage_3/fuse_0", "conv_block"),
    ("decoder0_header.1", "decoder/stage_3/fuse_1", "conv_block"),
    ("decoder0_header.2", "decoder/head", "single_conv"),
)

DECODER_PARTS = {
    "single_conv": (("block", "", "conv"),),
    "single_deconv": (("block", "", "deconv"),),
    "conv_block": (("block.0", "conv", "single_conv"), ("block.1", "norm", "batch_norm")),
    "deconv_block": (
        ("block.0", "deconv", "single_deconv"),
        ("block.1", "conv", "single_conv"),
        ("block.2", "norm", "batch_norm"),
    ),
}

DECODER_ARRAYS = {
    "conv": (KERNEL_OF_CONV, bias()),
    "deconv": (KERNEL_OF_DECONV, bias()),
    "batch_norm": (SCALE, bias(), *STATISTICS),
}

REFERENCE = Table(
    rows=(
        ("embedding", "encoder/embedding", "embedding"),
        ("transformer.layers.{layer}.0.norm", "encoder/block_{layer}/norm1", "norm"),
        ("transformer.layers.{layer}.0.fn", "encoder/block_{layer}/attention", "attention"),
        ("transformer.layers.{layer}.1.norm", "encoder/block_{layer}/norm2", "norm"),
        ("transformer.layers.{layer}.1.fn", "encoder/block_{layer}/feed_forward", "feed_forward"),
        *DECODER_ROWS,
    ),
    parts={
        "embedding": (("patch_embeddings", "projection", "conv"),),
        "attention": (("qkv", "qkv", "qkv"), ("projection", "projection", "projection")),
        "feed_forward": (("0", "expand", "linear"), ("3", "contract", "linear")),
        **DECODER_PARTS,
    },
    arrays={
        "embedding": (POSITIONS,),
        "qkv": (weight("kernel", layouts.QKV_WEIGHT), bias(layouts.QKV_BIAS)),
        "projection": PROJECTION,
        "linear": LINEAR,
        "norm": LAYER_NORM,
        **DECODER_ARRAYS,
    },
)
