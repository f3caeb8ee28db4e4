"""The decoder of Conv-BatchNorm-ReLU blocks, whose names two families have in common.

The article took the decoder of github.com/tamasino52/UNETR over, so the reference and that code
differ in the encoder's names only.
"""

from collections.abc import Sequence
from typing import Any

from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.decoder_spec import NUM_STAGES
from unetr_flax.weights.errors import CheckpointError
from unetr_flax.weights.families.shapes import Shapes
from unetr_flax.weights.tables import (
    KERNEL_OF_CONV,
    KERNEL_OF_DECONV,
    SCALE,
    STATISTICS,
    Array,
    Row,
    bias,
)

DECODER_ROWS: tuple[Row, ...] = (
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

DECODER_PARTS: dict[str, tuple[Row, ...]] = {
    "single_conv": (("block", "", "conv"),),
    "single_deconv": (("block", "", "deconv"),),
    "conv_block": (("block.0", "conv", "single_conv"), ("block.1", "norm", "batch_norm")),
    "deconv_block": (
        ("block.0", "deconv", "single_deconv"),
        ("block.1", "conv", "single_conv"),
        ("block.2", "norm", "batch_norm"),
    ),
}

DECODER_ARRAYS: dict[str, tuple[Array, ...]] = {
    "conv": (KERNEL_OF_CONV, bias()),
    "deconv": (KERNEL_OF_DECONV, bias()),
    "batch_norm": (SCALE, bias(), *STATISTICS),
}

# The modules that end the decoder's stages, coarsest first.
STAGES = (
    "decoder9_upsampler.2",
    "decoder6_upsampler.1",
    "decoder3_upsampler.1",
    "decoder0_header.1",
)

# The blocks that feed the decoder by default, in the code of both families.
DEFAULT_SKIP_LAYERS = (3, 6, 9, 12)


def skip_layers(given: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Returns the blocks that feed the decoder: the given ones, or those that must be.

    Args:
      given: the blocks, if the caller knows them.
      num_layers: transformer blocks.

    Raises:
      CheckpointError: if none are given, and there are more blocks than are needed but fewer than
        the code's default takes.
    """
    if given is not None:
        return tuple(given)
    if num_layers <= NUM_STAGES:
        return tuple(range(1, num_layers + 1))
    if num_layers < DEFAULT_SKIP_LAYERS[-1]:
        raise CheckpointError(
            f"skip_layers: shapes do not tell which of {num_layers} blocks feed the decoder, so "
            f"they must be given; the code's default is {DEFAULT_SKIP_LAYERS}"
        )
    return DEFAULT_SKIP_LAYERS


def spatial_rank(shapes: Shapes) -> int:
    """Returns the number of spatial axes."""
    return len(shapes["decoder0.0.block.0.block.weight"]) - 2


def decoder_width(shapes: Shapes) -> int:
    """Returns the decoder's channels at full resolution."""
    return shapes.axes("decoder0.1.block.0.block.weight", spatial_rank(shapes) + 2)[0]


def out_channels(shapes: Shapes) -> int:
    """Returns the channels of the logits."""
    return shapes["decoder0_header.2.block.weight"][0]


def torch_arguments(cfg: UNETRConfig) -> dict[str, Any]:
    """Returns the constructor's arguments that both PyTorch models have."""
    return {
        "img_shape": cfg.img_size,
        "input_dim": cfg.in_channels,
        "output_dim": cfg.out_channels,
        "embed_dim": cfg.hidden_size,
        "patch_size": cfg.patch_size,
        "num_heads": cfg.num_heads,
        "dropout": cfg.dropout_rate,
        "num_layers": cfg.num_layers,
        "mlp_dim": cfg.mlp_dim,
        "ext_layers": cfg.skip_layers,
    }
