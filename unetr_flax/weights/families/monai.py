"""The names of `monai.networks.nets.UNETR`, which depend on its options."""

from unetr_flax.model.config import UNETRConfig
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
    Row,
    Table,
    bias,
    weight,
)

ENCODER_ROWS = (
    ("vit.patch_embedding", "encoder/embedding", "embedding"),
    ("vit.blocks.{layer}.norm1", "encoder/block_{layer}/norm1", "norm"),
    ("vit.blocks.{layer}.attn", "encoder/block_{layer}/attention", "attention"),
    ("vit.blocks.{layer}.norm2", "encoder/block_{layer}/norm2", "norm"),
    ("vit.blocks.{layer}.mlp", "encoder/block_{layer}/feed_forward", "feed_forward"),
    ("vit.norm", "encoder/norm", "norm"),
)

# MONAI's names of each stage, coarsest first: the tower of its skip, and the rest.
STAGES = (("encoder4", "decoder5"), ("encoder3", "decoder4"), ("encoder2", "decoder3"))
LAST_STAGE = ("encoder1", "decoder2")


def monai_table(cfg: UNETRConfig) -> Table:
    """The table of a configuration of this family."""
    norm = (SCALE, bias()) if cfg.norm_affine else ()
    if cfg.norm == "batch":
        norm += STATISTICS
    patch = "patch_embeddings.1" if cfg.proj_type == "perceptron" else "patch_embeddings"
    qkv = (weight("kernel", layouts.QKV_OUTER_WEIGHT),)
    if cfg.qkv_bias:
        qkv += (bias(layouts.QKV_OUTER_BIAS),)
    return Table(
        rows=(*ENCODER_ROWS, *_decoder_rows(cfg)),
        parts={
            "embedding": ((patch, "projection", cfg.proj_type + "_embedding"),),
            "attention": (("qkv", "qkv", "qkv"), ("out_proj", "projection", "projection")),
            "feed_forward": (("linear1", "expand", "linear"), ("linear2", "contract", "linear")),
            "single_conv": (("conv", "", "conv"),),
            "single_conv_of_join": (("conv", "", "conv_of_join"),),
            "single_deconv": (("conv", "", "deconv"),),
            "head": (("conv", "", "conv_embedding"),),
            "unet_block": _block_parts("single_conv"),
            "fitted_block": _block_parts("single_conv") + _shortcut("single_conv"),
            "joined_block": _block_parts("single_conv_of_join"),
            "fitted_joined_block": (
                _block_parts("single_conv_of_join") + _shortcut("single_conv_of_join")
            ),
        },
        arrays={
            "embedding": (POSITIONS,),
            "conv_embedding": (KERNEL_OF_CONV, bias()),
            "perceptron_embedding": (
                weight("kernel", layouts.perceptron(cfg.spatial_rank)),
                bias(),
            ),
            "qkv": qkv,
            "projection": PROJECTION,
            "linear": LINEAR,
            "norm": LAYER_NORM,
            "conv": (KERNEL_OF_CONV,),
            "conv_of_join": (weight("kernel", layouts.CONV_OF_JOIN),),
            "deconv": (KERNEL_OF_DECONV,),
            "channel_norm": norm,
        },
    )


def same_width_blocks(cfg: UNETRConfig) -> list[tuple[str, int]]:
    """PyTorch names and widths of the blocks whose input is as wide as their output."""
    blocks = []
    if cfg.skip_convs:
        for i, (tower, _) in enumerate(STAGES):
            width = cfg.decoder_stages[i].channels
            blocks += [(f"{tower}.blocks.{block}.1", width) for block in range(i)]
    if cfg.in_channels == cfg.channels[0]:
        blocks.append((f"{LAST_STAGE[0]}.layer", cfg.channels[0]))
    return blocks


def _decoder_rows(cfg: UNETRConfig) -> list[Row]:
    residual = cfg.block == "residual"
    joined = "fitted_joined_block" if residual else "joined_block"
    rows = []
    for i, (tower, rest) in enumerate(STAGES):
        stage = f"decoder/stage_{i}"
        rows.append((f"{rest}.transp_conv", f"{stage}/upsample", "single_deconv"))
        rows.append((f"{tower}.transp_conv_init", f"{stage}/skip_0", "single_deconv"))
        for block in range(i):
            name, path = f"{tower}.blocks.{block}", f"{stage}/skip_{block + 1}"
            if cfg.skip_convs:
                rows.append((f"{name}.0", f"{path}/deconv", "single_deconv"))
                rows.append((f"{name}.1", path, "unet_block"))
            else:
                rows.append((name, path, "single_deconv"))
        rows.append((f"{rest}.conv_block", f"{stage}/fuse_0", joined))
    stage, (image, rest) = f"decoder/stage_{len(STAGES)}", LAST_STAGE
    fitted = residual and cfg.in_channels != cfg.channels[0]
    return [
        *rows,
        (f"{rest}.transp_conv", f"{stage}/upsample", "single_deconv"),
        (f"{image}.layer", f"{stage}/skip_0", "fitted_block" if fitted else "unet_block"),
        (f"{rest}.conv_block", f"{stage}/fuse_0", joined),
        ("out.conv", "decoder/head", "head"),
    ]


def _block_parts(first_conv: str) -> tuple[Row, ...]:
    return (
        ("conv1", "conv1", first_conv),
        ("norm1", "norm1", "channel_norm"),
        ("conv2", "conv2", "single_conv"),
        ("norm2", "norm2", "channel_norm"),
    )


def _shortcut(conv: str) -> tuple[Row, ...]:
    return (("conv3", "conv3", conv), ("norm3", "norm3", "channel_norm"))
