"""The configuration of a PyTorch checkpoint, from the names and shapes of its arrays."""

import fractions
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.unwrap import CheckpointError, unwrap

# How keys begin that every model of a family has and no other.
SIGNATURES = {
    "reference": ("embedding.", "transformer.layers."),
    "monai": ("vit.",),
    "tamasino52": ("transformer.embeddings.", "transformer.layer."),
}


def recognize(keys: Iterable[str]) -> str:
    """The family of a state dict.

    Raises:
      CheckpointError: if it is of none.
    """
    keys = list(keys)
    for family, prefixes in SIGNATURES.items():
        if any(key.startswith(prefixes) for key in keys):
            return family
    known = ", ".join(f"{prefixes[-1]}* ({family})" for family, prefixes in SIGNATURES.items())
    raise CheckpointError(
        f"state dict: not a known UNETR; keys must be like {known}, but are like "
        f"{', '.join(keys[:3])}"
    )


def infer_config(
    state_dict: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    img_size: Sequence[int] | None = None,
    skip_layers: Sequence[int] | None = None,
    norm_name: str | tuple[str, Mapping[str, Any]] | None = None,
    dropout_rate: float = 0.0,
) -> UNETRConfig:
    """The configuration of a checkpoint: what shapes tell, and what only the caller can.

    Args:
      state_dict: arrays or tensors by key, or a checkpoint that holds such a state dict.
      num_heads: attention heads, of which shapes say nothing: required.
      img_size: voxels per axis; if None, the tokens must be as many as those of a cube, and are
        taken to be one.
      skip_layers: the blocks that feed the decoder; by default those that the family's code names,
        the ends of four equal parts of the blocks, and for MONAI 4, 7, 10 and 12.
      norm_name: MONAI's, required for group norms and affine instance norms, which look the same.
      dropout_rate: probability of dropping, which matters only in training.

    Raises:
      CheckpointError: naming what is missing, or what has to be told.
      ValueError: if the sizes are not those of a model that can be built.
    """
    state_dict, _ = unwrap(state_dict)
    family = recognize(state_dict)
    if num_heads is None:
        defaults = {"reference": 8, "monai": 12, "tamasino52": 12}
        raise CheckpointError(
            "num_heads: shapes do not tell it and it must be given; the default of family "
            f"{family!r} is {defaults[family]}"
        )
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    told = {"num_heads": num_heads, "dropout_rate": dropout_rate}
    if family == "monai":
        if skip_layers is not None:
            raise CheckpointError("skip_layers: MONAI's model fixes them, they cannot be given")
        return _monai(_Shapes(shapes), img_size, norm_name, told)
    if norm_name is not None:
        raise CheckpointError(f"norm_name: cannot be given for family {family!r}")
    return _of_conv_blocks(family, _Shapes(shapes), img_size, skip_layers, told)


class _Shapes(dict):
    """Shapes by key; a missing key is an error that says so."""

    def __missing__(self, key: str):
        raise CheckpointError(f"state dict: {key} is missing, and needed to tell the model's sizes")

    def axes(self, key: str, count: int) -> tuple[int, ...]:
        """A shape that must have so many axes."""
        if len(self[key]) != count:
            raise CheckpointError(
                f"state dict: {key} has shape {self[key]}, must have {count} axes"
            )
        return self[key]

    def count(self, pattern: str) -> int:
        """How many layers there are, by the number in their keys."""
        numbers = {int(m[1]) for key in self if (m := re.fullmatch(pattern, key))}
        if numbers != set(range(len(numbers))):
            raise CheckpointError(f"state dict: transformer blocks {sorted(numbers)} have gaps")
        return len(numbers)


def _of_conv_blocks(
    family: str,
    shapes: _Shapes,
    img_size: Sequence[int] | None,
    skip_layers: Sequence[int] | None,
    told: dict[str, Any],
) -> UNETRConfig:
    if family == "reference":
        prefix, layers = "embedding", r"transformer\.layers\.(\d+)\.0\.norm\.weight"
        mlp = "transformer.layers.0.1.fn.0.weight"
    else:
        prefix, layers = "transformer.embeddings", r"transformer\.layer\.(\d+)\.mlp_norm\.weight"
        mlp = "transformer.layer.0.mlp.w_1.weight"
    rank = len(shapes["decoder0.0.block.0.block.weight"]) - 2
    patch = shapes.axes(f"{prefix}.patch_embeddings.weight", rank + 2)
    hidden_size, in_channels, *patch_size = patch
    _, tokens, _ = shapes.axes(f"{prefix}.position_embeddings", 3)
    width = shapes.axes("decoder0.1.block.0.block.weight", rank + 2)[0]
    sizes = {
        "img_size": _image(img_size, patch_size, tokens),
        "in_channels": in_channels,
        "out_channels": shapes["decoder0_header.2.block.weight"][0],
        "patch_size": tuple(patch_size),
        "hidden_size": hidden_size,
        "num_layers": shapes.count(layers),
        "mlp_dim": shapes[mlp][0],
        "skip_layers": skip_layers,
        **told,
    }
    if family == "tamasino52":
        return UNETRConfig.tamasino52(width=width, **sizes)
    # The exact divisor: a float could truncate to a width one below.
    return UNETRConfig.reference(light_r=fractions.Fraction(64, width), **sizes)


def _monai(
    shapes: _Shapes,
    img_size: Sequence[int] | None,
    norm_name: str | tuple[str, Mapping[str, Any]] | None,
    told: dict[str, Any],
) -> UNETRConfig:
    first = shapes["encoder1.layer.conv1.conv.weight"]
    rank = len(first) - 2
    feature_size, in_channels = first[:2]
    _, tokens, hidden_size = shapes.axes("vit.patch_embedding.position_embeddings", 3)
    layers = shapes.count(r"vit\.blocks\.(\d+)\.norm1\.weight")
    if layers != 12:
        raise CheckpointError(f"state dict: {layers} transformer blocks, MONAI's UNETR has 12")
    return UNETRConfig.monai(
        img_size=_image(img_size, (16,) * rank, tokens),
        in_channels=in_channels,
        out_channels=shapes["out.conv.conv.weight"][0],
        feature_size=feature_size,
        hidden_size=hidden_size,
        mlp_dim=shapes["vit.blocks.0.mlp.linear1.weight"][0],
        proj_type=(
            "perceptron" if "vit.patch_embedding.patch_embeddings.1.weight" in shapes else "conv"
        ),
        norm_name=norm_name or _monai_norm(shapes),
        conv_block="encoder3.blocks.0.1.conv1.conv.weight" in shapes,
        res_block="decoder5.conv_block.conv3.conv.weight" in shapes,
        qkv_bias="vit.blocks.0.attn.qkv.bias" in shapes,
        **told,
    )


def _monai_norm(shapes: _Shapes) -> str | tuple[str, dict[str, bool]]:
    """The norm whose arrays are there; one without any is an instance norm."""
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


def _image(
    img_size: Sequence[int] | None, patch_size: Sequence[int], tokens: int
) -> tuple[int, ...]:
    """The image's size: as told, or that of a cube of patches."""
    if img_size is not None:
        return tuple(img_size)
    rank = len(patch_size)
    edge = round(tokens ** (1 / rank))
    if edge**rank != tokens:
        raise CheckpointError(
            f"img_size: {tokens} position embeddings are not those of {rank} equal axes, so it "
            "must be given"
        )
    return tuple(edge * patch for patch in patch_size)
