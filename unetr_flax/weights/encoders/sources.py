"""Names in the files of pretrained 3D vision transformers, by the project that writes them."""

import dataclasses
from collections.abc import Callable

from unetr_flax.weights import layouts
from unetr_flax.weights.families.shapes import Shapes
from unetr_flax.weights.tables import (
    KERNEL_OF_CONV,
    LAYER_NORM,
    LINEAR,
    POSITIONS,
    PROJECTION,
    Array,
    Row,
    Table,
    bias,
    weight,
)


@dataclasses.dataclass(frozen=True)
class EncoderSource:
    """All that is known about one project's encoders.

    All have pre-norm blocks, exact GELU, energies divided by the square root of a head's width,
    and a norm after the last block.

    Attributes:
      name: the project and its models.
      anchor: a key of every file; what stands before it is the prefix of a wrapper.
      embedding: name of the module that embeds patches.
      block: regular expression for one key of each block; its group is the block's number.
      table: returns names of modules and arrays for the shapes in a file.
      epsilon: number that the norms add to a variance.
      class_token: key of a token that the encoder has beside those of patches.
      class_row: whether the positions may have a row for that token, before those of patches.
      unapplied: beginnings of keys, below a block or the embedding, of arrays that are never
        applied.
    """

    name: str
    anchor: str
    embedding: str
    block: str
    table: Callable[[Shapes], Table]
    epsilon: float
    class_token: str
    class_row: bool = False
    unapplied: tuple[str, ...] = ()


def _monai_table(shapes: Shapes) -> Table:
    perceptron = "patch_embedding.patch_embeddings.1.weight" in shapes
    patch = "patch_embedding.patch_embeddings" + (".1" if perceptron else "")
    # The masked autoencoder appends its last norm to the blocks.
    norm = "norm" if "norm.weight" in shapes else f"blocks.{shapes.count(MONAI.block)}"
    return _table(
        rows=(
            ("patch_embedding", "encoder/embedding", "positions"),
            (patch, "encoder/embedding/projection", "embedding"),
            *_block_rows("blocks.{layer}", "out_proj", "linear1", "linear2"),
            (norm, "encoder/norm", "norm"),
        ),
        embedding=weight("kernel", layouts.perceptron(3)) if perceptron else KERNEL_OF_CONV,
        positions=POSITIONS,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
    )


def _selfmedmae_table(shapes: Shapes) -> Table:
    # Pre-training keeps the positions outside of the encoder, fine-tuning inside.
    positions = "encoder_pos_embed" if "encoder_pos_embed" in shapes else "encoder.pos_embed"
    return _table(
        rows=(
            (positions, "encoder/embedding", "positions"),
            ("encoder.patch_embed.proj", "encoder/embedding/projection", "embedding"),
            *_block_rows("encoder.blocks.{layer}", "proj", "fc1", "fc2"),
            ("encoder.norm", "encoder/norm", "norm"),
        ),
        embedding=KERNEL_OF_CONV,
        positions=("", *POSITIONS[1:]),
        qkv_bias="encoder.blocks.0.attn.qkv.bias" in shapes,
    )


def _block_rows(block: str, projection: str, expand: str, contract: str) -> tuple[Row, ...]:
    ours = "encoder/block_{layer}"
    return (
        (f"{block}.norm1", f"{ours}/norm1", "norm"),
        (f"{block}.attn.qkv", f"{ours}/attention/qkv", "qkv"),
        (f"{block}.attn.{projection}", f"{ours}/attention/projection", "projection"),
        (f"{block}.norm2", f"{ours}/norm2", "norm"),
        (f"{block}.mlp.{expand}", f"{ours}/feed_forward/expand", "linear"),
        (f"{block}.mlp.{contract}", f"{ours}/feed_forward/contract", "linear"),
    )


def _table(rows: tuple[Row, ...], embedding: Array, positions: Array, qkv_bias: bool) -> Table:
    qkv = (weight("kernel", layouts.QKV_OUTER_WEIGHT),)
    if qkv_bias:
        qkv += (bias(layouts.QKV_OUTER_BIAS),)
    return Table(
        rows=rows,
        parts={},
        arrays={
            "embedding": (embedding, bias()),
            "positions": (positions,),
            "norm": LAYER_NORM,
            "qkv": qkv,
            "projection": PROJECTION,
            "linear": LINEAR,
        },
    )


# ViT, ViTAutoEnc and MaskedAutoEncoderViT of monai.networks.nets; encoders of its UNETR, too.
MONAI = EncoderSource(
    name="MONAI's ViT, ViTAutoEnc or MaskedAutoEncoderViT",
    anchor="patch_embedding.position_embeddings",
    embedding="patch_embedding",
    block=r"blocks\.(\d+)\.norm1\.weight",
    table=_monai_table,
    epsilon=1e-5,
    class_token="cls_token",
    unapplied=("cross_attn.", "norm_cross_attn.", "cls_token"),
)

# Zhou et al. 2022, "Self Pre-training with Masked Autoencoders for Medical Image Analysis",
# github.com/cvlab-stonybrook/SelfMedMAE: timm's blocks.
SELFMEDMAE = EncoderSource(
    name="SelfMedMAE's encoder",
    anchor="encoder.patch_embed.proj.weight",
    embedding="encoder.patch_embed",
    block=r"encoder\.blocks\.(\d+)\.norm1\.weight",
    table=_selfmedmae_table,
    epsilon=1e-6,
    class_token="encoder.cls_token",
    class_row=True,
)

SOURCES = (MONAI, SELFMEDMAE)
