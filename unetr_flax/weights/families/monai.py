"""Files of `monai.networks.nets.UNETR`, from MONAI 0.7 on; its names depend on its options."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights import layouts
from unetr_flax.weights.counters import BATCH_COUNTER
from unetr_flax.weights.errors import CheckpointError
from unetr_flax.weights.families.identities import identity_linear, identity_norm
from unetr_flax.weights.families.registry import Family, TorchModel
from unetr_flax.weights.families.shapes import Shapes, image_size
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

# The two modules of each of the decoder's stages, coarsest first: the tower of deconvolutions that
# makes the skip, and the rest.
STAGES = (("encoder4", "decoder5"), ("encoder3", "decoder4"), ("encoder2", "decoder3"))
LAST_STAGE = ("encoder1", "decoder2")

# Versions of MONAI at which the unused keys changed.
VERSIONS = ("0.7", "0.9", "1.4", "1.6")


def _table(cfg: UNETRConfig) -> Table:
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
            "single_fuse_conv": (("conv", "", "fuse_conv"),),
            "single_deconv": (("conv", "", "deconv"),),
            "head": (("conv", "", "conv_embedding"),),
            # Fitted blocks have a convolution in their shortcut, since their width changes. Fuse
            # blocks take a concatenation, whose halves are in the other order in Flax.
            "unet_block": _block_parts("single_conv"),
            "fitted_block": _block_parts("single_conv") + _shortcut("single_conv"),
            "fuse_block": _block_parts("single_fuse_conv"),
            "fitted_fuse_block": (_block_parts("single_fuse_conv") + _shortcut("single_fuse_conv")),
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
            "fuse_conv": (weight("kernel", layouts.CONV_OF_CONCATENATION),),
            "deconv": (KERNEL_OF_DECONV,),
            "channel_norm": norm,
        },
    )


def _decoder_rows(cfg: UNETRConfig) -> list[Row]:
    residual = cfg.block == "residual"
    fuse = "fitted_fuse_block" if residual else "fuse_block"
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
        rows.append((f"{rest}.conv_block", f"{stage}/fuse_0", fuse))
    stage, (image, rest) = f"decoder/stage_{len(STAGES)}", LAST_STAGE
    fitted = residual and cfg.in_channels != cfg.channels[0]
    return [
        *rows,
        (f"{rest}.transp_conv", f"{stage}/upsample", "single_deconv"),
        (f"{image}.layer", f"{stage}/skip_0", "fitted_block" if fitted else "unet_block"),
        (f"{rest}.conv_block", f"{stage}/fuse_0", fuse),
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


def _config(
    shapes: Shapes,
    *,
    num_heads: int,
    img_size: Sequence[int] | None,
    norm_name: str | tuple[str, Mapping[str, Any]] | None,
    dropout_rate: float,
) -> UNETRConfig:
    first = shapes["encoder1.layer.conv1.conv.weight"]
    rank = len(first) - 2
    feature_size, in_channels = first[:2]
    _, tokens, hidden_size = shapes.axes("vit.patch_embedding.position_embeddings", 3)
    layers = shapes.count(r"vit\.blocks\.(\d+)\.norm1\.weight")
    if layers != 12:
        raise CheckpointError(f"state dict: {layers} transformer blocks, MONAI's UNETR has 12")
    return UNETRConfig.monai(
        img_size=image_size(img_size, (16,) * rank, tokens),
        in_channels=in_channels,
        out_channels=shapes["out.conv.conv.weight"][0],
        feature_size=feature_size,
        hidden_size=hidden_size,
        mlp_dim=shapes["vit.blocks.0.mlp.linear1.weight"][0],
        num_heads=num_heads,
        proj_type=(
            "perceptron" if "vit.patch_embedding.patch_embeddings.1.weight" in shapes else "conv"
        ),
        norm_name=norm_name or _norm_name(shapes),
        conv_block="encoder3.blocks.0.1.conv1.conv.weight" in shapes,
        res_block="decoder5.conv_block.conv3.conv.weight" in shapes,
        dropout_rate=dropout_rate,
        qkv_bias="vit.blocks.0.attn.qkv.bias" in shapes,
    )


def _norm_name(shapes: Shapes) -> str | tuple[str, dict[str, bool]]:
    """Returns the norm whose arrays are there; a norm without any is an instance norm."""
    norm = "decoder5.conv_block.norm1"
    affine = f"{norm}.weight" in shapes
    if f"{norm}.running_mean" in shapes:
        return "batch" if affine else ("batch", {"affine": False})
    if affine:
        raise CheckpointError(
            "norm_name: shapes do not tell group norms from affine instance norms; give "
            "('group', {'num_groups': n}) or ('instance', {'affine': True})"
        )
    return "instance"


def _unused_keys(cfg: UNETRConfig, version: str | None) -> dict[str, np.ndarray]:
    """Returns class tokens, shortcuts of blocks that need none, and cross-attention.

    Raises:
      ValueError: if the version is none of MONAI's from 0.7 on.
    """
    major_minor = _parsed(version or VERSIONS[-1])
    keys = {}
    if major_minor < (0, 9):
        keys["vit.patch_embedding.cls_token"] = np.zeros((1, 1, cfg.hidden_size), np.float32)
        if cfg.block == "residual":
            keys |= _idle_shortcuts(cfg)
    if major_minor >= (1, 4):
        for layer in range(cfg.num_layers):
            block = f"vit.blocks.{layer}"
            keys |= identity_norm(f"{block}.norm_cross_attn", cfg.hidden_size)
            if major_minor < (1, 6):
                keys |= _cross_attention(f"{block}.cross_attn", cfg)
    return keys


def _parsed(version: str) -> tuple[int, int]:
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise ValueError(f"version {version!r}: must be a MONAI version, such as 1.6") from None
    if (major, minor) < (0, 7):
        raise ValueError(f"version {version}: must be 0.7 or later; UNETR has other keys before")
    return major, minor


def _cross_attention(name: str, cfg: UNETRConfig) -> dict[str, np.ndarray]:
    keys = {}
    for linear in ("out_proj", "to_q", "to_k", "to_v"):
        bias = linear == "out_proj" or cfg.qkv_bias
        keys |= identity_linear(f"{name}.{linear}", cfg.hidden_size, bias=bias)
    return keys


def _idle_shortcuts(cfg: UNETRConfig) -> dict[str, np.ndarray]:
    keys = {}
    for block, width in _same_width_blocks(cfg):
        kernel = np.eye(width, dtype=np.float32).reshape(width, width, *(1,) * cfg.spatial_rank)
        keys[f"{block}.conv3.conv.weight"] = kernel
        norm = f"{block}.norm3"
        if cfg.norm_affine:
            keys |= identity_norm(norm, width)
        if cfg.norm == "batch":
            keys[f"{norm}.running_mean"] = np.zeros(width, np.float32)
            keys[f"{norm}.running_var"] = np.ones(width, np.float32)
            keys[f"{norm}.{BATCH_COUNTER}"] = np.zeros((), np.int64)
    return keys


def _same_width_blocks(cfg: UNETRConfig) -> list[tuple[str, int]]:
    """Returns names and widths of the blocks whose input is as wide as their output."""
    blocks = []
    if cfg.skip_convs:
        for i, (tower, _) in enumerate(STAGES):
            width = cfg.decoder_stages[i].channels
            blocks += [(f"{tower}.blocks.{block}.1", width) for block in range(i)]
    if cfg.in_channels == cfg.channels[0]:
        blocks.append((f"{LAST_STAGE[0]}.layer", cfg.channels[0]))
    return blocks


def _torch_model(cfg: UNETRConfig) -> Any:
    from monai.networks.nets.unetr import UNETR

    options: dict[str, Any] = {"affine": cfg.norm_affine}
    if cfg.norm == "group":
        options["num_groups"] = cfg.norm_groups
    return UNETR(
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        img_size=cfg.img_size,
        feature_size=cfg.channels[0],
        hidden_size=cfg.hidden_size,
        mlp_dim=cfg.mlp_dim,
        num_heads=cfg.num_heads,
        proj_type=cfg.proj_type,
        norm_name=(cfg.norm, options),
        conv_block=cfg.skip_convs,
        res_block=cfg.block == "residual",
        dropout_rate=cfg.dropout_rate,
        spatial_dims=cfg.spatial_rank,
        qkv_bias=cfg.qkv_bias,
    )


def _features(output: Any, cfg: UNETRConfig) -> Sequence[Any]:
    """Takes the features from what MONAI's ViT returns: its last output and all hidden states."""
    last, hidden = output
    return [*(hidden[layer - 1] for layer in cfg.skip_layers[:-1]), last]


MONAI = Family(
    name="monai",
    signature="vit.blocks.",
    table=_table,
    config=_config,
    default_num_heads=12,
    options=("norm_name",),
    torch_model=TorchModel(
        make=_torch_model,
        package="monai",
        install="monai",
        encoder="vit",
        stages=tuple(rest for _, rest in (*STAGES, LAST_STAGE)),
        qkv="(qkv h d)",
        attention_dropout="drop_weights",
        features=_features,
    ),
    unused_keys=_unused_keys,
    versions=VERSIONS,
)
