"""Properties that all models of a family have in common, whatever their sizes."""

import dataclasses
from typing import Any

from unetr_flax.model.choices import Activation, Block, Sublayer


@dataclasses.dataclass(frozen=True)
class FamilySpec:
    """Properties of the models of one author.

    Attributes:
      scale_by_head: whether attention energies are divided by the square root of the head's width,
        rather than of the whole hidden size.
      layer_norm_epsilon: number that the transformer's norms add to a variance.
      activation: "gelu" (exact) or "relu", in the feed-forward layers.
      final_norm: whether the last feature is normalized.
      output_dropout: sublayers whose outputs have dropout, "attention" or "feed_forward".
      position_std: standard deviation of the position embeddings at initialization.
      blocks: kinds of decoder blocks that the models may have.
      tapering_skips: whether the skips' towers narrow from level to level as the decoder does.
      early_narrowing: whether the convolutions of a stage narrow to the width of the next stage,
        rather than the next stage's up-sampling.
      fixed: fields of `UNETRConfig` with one value in all models, as pairs of name and value.
    """

    scale_by_head: bool
    layer_norm_epsilon: float
    activation: Activation
    final_norm: bool
    output_dropout: tuple[Sublayer, ...]
    position_std: float
    blocks: tuple[Block, ...]
    tapering_skips: bool
    early_narrowing: bool
    fixed: tuple[tuple[str, Any], ...] = ()


# The options of models that have Conv-BatchNorm-ReLU blocks only.
CONV_BLOCKS_ONLY = (
    ("proj_type", "conv"),
    ("norm", "batch"),
    ("qkv_bias", True),
    ("skip_convs", True),
    ("norm_affine", True),
)

FAMILY_SPECS: dict[str, FamilySpec] = {
    # The article's model, `unetr_torch_ref.UNETR`.
    "reference": FamilySpec(
        scale_by_head=False,
        layer_norm_epsilon=1e-5,
        activation="gelu",
        final_norm=False,
        output_dropout=(),
        position_std=0.0,
        blocks=("conv",),
        tapering_skips=False,
        early_narrowing=True,
        fixed=CONV_BLOCKS_ONLY,
    ),
    # monai.networks.nets.UNETR.
    "monai": FamilySpec(
        scale_by_head=True,
        layer_norm_epsilon=1e-5,
        activation="gelu",
        final_norm=True,
        output_dropout=("attention", "feed_forward"),
        position_std=0.02,
        blocks=("residual", "basic"),
        tapering_skips=False,
        early_narrowing=False,
    ),
    # github.com/tamasino52/UNETR, `unetr_torch_ref.Tamasino52UNETR`.
    "tamasino52": FamilySpec(
        scale_by_head=True,
        layer_norm_epsilon=1e-6,
        activation="relu",
        final_norm=False,
        output_dropout=("attention",),
        position_std=0.0,
        blocks=("conv",),
        tapering_skips=True,
        early_narrowing=False,
        fixed=CONV_BLOCKS_ONLY,
    ),
}


def register_spec(name: str, spec: FamilySpec) -> None:
    """Registers a family, so that `UNETRConfig(family=name, ...)` accepts its name.

    Args:
      name: name of the family.
      spec: properties of its models.

    Raises:
      ValueError: if the name is taken.
    """
    if name in FAMILY_SPECS:
        raise ValueError(f"family {name!r}: is registered already")
    FAMILY_SPECS[name] = spec
