"""The configuration of a UNETR: every size and option in one validated, frozen dataclass."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from unetr_flax.model.arguments import integer, integers, monai_norm, one_of, reference_channels
from unetr_flax.model.choices import Block, Norm, Projection
from unetr_flax.model.decoder_spec import (
    NUM_STAGES,
    PATCH_SIZES,
    BlockStyle,
    DecoderStage,
    decoder_stages,
    doubling_widths,
)
from unetr_flax.model.family_spec import FAMILY_SPECS, FamilySpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNETRConfig:
    """Sizes and options of a UNETR (Hatamizadeh et al. 2022, section 3.1).

    A configuration comes from a preset, `reference`, `monai` or `tamasino52`, or from a checkpoint
    by `unetr_flax.weights.infer_config`. The constructor takes every field explicitly.

    Attributes:
      family: "reference", "monai", "tamasino52" or another registered family; its `FamilySpec`
        holds the properties that all its models share.
      img_size: voxels per spatial axis; any number of axes.
      in_channels: channels of the image.
      out_channels: channels of the logits, one per class.
      patch_size: voxels per patch and axis, each 1, 2, 4, 8 or 16. An axis with a patch smaller
        than 16 is not up-sampled in the coarsest stages, so thin volumes keep their detail.
      proj_type: "conv" or "perceptron", PyTorch's form of the patch embedding; the results are the
        same.
      hidden_size: width of the tokens, E in the paper.
      num_layers: transformer blocks.
      num_heads: attention heads; divides hidden_size.
      mlp_dim: width of the feed-forward layer.
      qkv_bias: whether queries, keys and values have biases.
      skip_layers: the four blocks (counted from 1) whose outputs feed the decoder; the last of
        them feeds the deepest stage, and later blocks would have no effect.
      channels: widths of the decoder's stages from full resolution to the coarsest, each twice the
        one before.
      skip_convs: whether convolution blocks follow the up-sampling of skips.
      block: "conv", "basic" or "residual", see `BlockStyle`.
      norm: "batch", "instance" or "group", of the decoder.
      norm_groups: channel groups of a group norm, None for other norms.
      norm_affine: whether the decoder's norms scale and shift.
      dropout_rate: probability of dropping embeddings, attention weights, feed-forward units and,
        where the family does, outputs of sublayers.

    Raises:
      ValueError: if the model cannot be built; the message names field, value and what is allowed.
    """

    family: str
    img_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    patch_size: tuple[int, ...]
    proj_type: Projection
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    qkv_bias: bool
    skip_layers: tuple[int, ...]
    channels: tuple[int, ...]
    skip_convs: bool
    block: Block
    norm: Norm
    norm_groups: int | None
    norm_affine: bool
    dropout_rate: float

    @classmethod
    def reference(
        cls,
        img_size: Sequence[int],
        in_channels: int,
        out_channels: int,
        light_r: float = 4,
        *,
        patch_size: int | Sequence[int] = 16,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 8,
        mlp_dim: int | None = None,
        skip_layers: Sequence[int] | None = None,
        dropout_rate: float = 0.0,
    ) -> Self:
        """Configures `unetr_torch_ref.UNETR`: the paper's, with a decoder `light_r` times narrower.

        Args:
          img_size: voxels per spatial axis.
          in_channels: channels of the image.
          out_channels: channels of the logits.
          light_r: divisor of the decoder's widths 32, 64, 128, 256, 512; may be fractional.
          patch_size: voxels per patch, one number or one per axis, each 1, 2, 4, 8 or 16.
          hidden_size: width of the tokens.
          num_layers: transformer blocks.
          num_heads: attention heads.
          mlp_dim: width of the feed-forward layer; 4 x hidden_size if None.
          skip_layers: the four blocks that feed the decoder; the ends of four equal parts if None,
            which for 12 blocks are 3, 6, 9 and 12.
          dropout_rate: probability of dropping.
        """
        return cls._of_conv_blocks(
            family="reference",
            img_size=img_size,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_dim=4 * integer("hidden_size", hidden_size) if mlp_dim is None else mlp_dim,
            skip_layers=skip_layers,
            channels=reference_channels(light_r),
            dropout_rate=dropout_rate,
        )

    @classmethod
    def tamasino52(
        cls,
        img_size: Sequence[int],
        in_channels: int,
        out_channels: int,
        *,
        patch_size: int | Sequence[int] = 16,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 2048,
        skip_layers: Sequence[int] | None = None,
        width: int = 64,
        dropout_rate: float = 0.0,
    ) -> Self:
        """Configures the model of github.com/tamasino52/UNETR, `unetr_torch_ref.Tamasino52UNETR`.

        Args:
          img_size: voxels per spatial axis.
          in_channels: channels of the image.
          out_channels: channels of the logits.
          patch_size: voxels per patch, one number or one per axis, each 1, 2, 4, 8 or 16.
          hidden_size: width of the tokens.
          num_layers: transformer blocks.
          num_heads: attention heads.
          mlp_dim: width of the feed-forward layer.
          skip_layers: the four blocks that feed the decoder, as in `reference`.
          width: channels of the decoder at full resolution.
          dropout_rate: probability of dropping; PyTorch's feed-forward layers always drop 0.1.
        """
        width = integer("width", width)
        return cls._of_conv_blocks(
            family="tamasino52",
            img_size=img_size,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            skip_layers=skip_layers,
            channels=doubling_widths(width),
            dropout_rate=dropout_rate,
        )

    @classmethod
    def _of_conv_blocks(cls, img_size, patch_size, num_layers, skip_layers, **values: Any) -> Self:
        """Configures a family whose decoder has Conv-BatchNorm-ReLU blocks."""
        img_size = integers("img_size", img_size)
        if isinstance(patch_size, Sequence):
            patch_size = integers("patch_size", patch_size)
        else:
            patch_size = (integer("patch_size", patch_size),) * len(img_size)
        num_layers = integer("num_layers", num_layers)
        if skip_layers is None:
            skip_layers = tuple(num_layers * i // NUM_STAGES for i in range(1, NUM_STAGES + 1))
        return cls(
            img_size=img_size,
            patch_size=patch_size,
            proj_type="conv",
            num_layers=num_layers,
            skip_layers=tuple(skip_layers),
            qkv_bias=True,
            skip_convs=True,
            block="conv",
            norm="batch",
            norm_groups=None,
            norm_affine=True,
            **values,
        )

    @classmethod
    def monai(
        cls,
        img_size: Sequence[int] | int,
        in_channels: int,
        out_channels: int,
        feature_size: int = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_heads: int = 12,
        proj_type: Projection = "conv",
        norm_name: str | tuple[str, Mapping[str, Any]] = "instance",
        conv_block: bool = True,
        res_block: bool = True,
        dropout_rate: float = 0.0,
        spatial_dims: int = 3,
        qkv_bias: bool = False,
    ) -> Self:
        """Configures `monai.networks.nets.UNETR` (MONAI 1.6) by its own arguments.

        Args:
          img_size: voxels per spatial axis, multiples of 16; one number stands for `spatial_dims`
            equal ones.
          in_channels: channels of the image.
          out_channels: channels of the logits.
          feature_size: channels of the decoder at full resolution.
          hidden_size: width of the tokens.
          mlp_dim: width of the feed-forward layer.
          num_heads: attention heads.
          proj_type: "conv" or "perceptron".
          norm_name: "instance", "batch" or ("group", {"num_groups": n}); a pair may also hold
            "affine". By default all but instance norms are affine.
          conv_block: whether convolution blocks follow the up-sampling of skips.
          res_block: whether blocks are residual.
          dropout_rate: probability of dropping.
          spatial_dims: number of axes, if img_size is one number.
          qkv_bias: whether queries, keys and values have biases.
        """
        if not isinstance(img_size, Sequence):
            img_size = (img_size,) * integer("spatial_dims", spatial_dims)
        img_size = integers("img_size", img_size)
        norm, norm_groups, norm_affine = monai_norm(norm_name)
        return cls(
            family="monai",
            img_size=img_size,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=(PATCH_SIZES[-1],) * len(img_size),
            proj_type=proj_type,
            hidden_size=hidden_size,
            num_layers=12,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            qkv_bias=qkv_bias,
            skip_layers=(4, 7, 10, 12),
            channels=doubling_widths(integer("feature_size", feature_size)),
            skip_convs=conv_block,
            block="residual" if res_block else "basic",
            norm=norm,
            norm_groups=norm_groups,
            norm_affine=norm_affine,
            dropout_rate=dropout_rate,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a configuration from `to_dict`'s result, lists or tuples alike.

        Raises:
          ValueError: if fields are missing, unknown or invalid.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
            raise ValueError(f"UNETRConfig: missing fields {missing}, unknown fields {unknown}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    def __post_init__(self):
        for name in ("img_size", "patch_size", "skip_layers", "channels"):
            object.__setattr__(self, name, integers(name, getattr(self, name)))
        for name in (
            "in_channels",
            "out_channels",
            "hidden_size",
            "num_layers",
            "num_heads",
            "mlp_dim",
        ):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        self._check_options()
        self._check_transformer()
        self._check_decoder()

    def _check_options(self) -> None:
        one_of("family", self.family, FAMILY_SPECS)
        one_of("proj_type", self.proj_type, ("conv", "perceptron"))
        one_of("norm", self.norm, ("batch", "instance", "group"))
        family = f"family={self.family!r}"
        one_of(f"{family}, block", self.block, self.family_spec.blocks)
        for name in ("qkv_bias", "skip_convs", "norm_affine"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        for name, value in self.family_spec.fixed:
            one_of(f"{family}, {name}", getattr(self, name), (value,))
        if not isinstance(self.dropout_rate, (int, float)) or not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate={self.dropout_rate!r}: must be in [0, 1)")

    def _check_transformer(self) -> None:
        if len(self.patch_size) != len(self.img_size):
            raise ValueError(
                f"patch_size={self.patch_size}: needs one size for each axis of "
                f"img_size={self.img_size}"
            )
        for size, patch in zip(self.img_size, self.patch_size, strict=True):
            if patch not in PATCH_SIZES:
                raise ValueError(f"patch_size={self.patch_size}: each must be one of {PATCH_SIZES}")
            if size % patch:
                raise ValueError(
                    f"img_size={self.img_size}: each must be divisible by its "
                    f"patch_size={self.patch_size}"
                )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads}: must divide hidden_size={self.hidden_size}"
            )
        if (
            len(self.skip_layers) != NUM_STAGES
            or sorted(set(self.skip_layers)) != list(self.skip_layers)
            or self.skip_layers[-1] > self.num_layers
        ):
            raise ValueError(
                f"skip_layers={self.skip_layers}: must be {NUM_STAGES} increasing numbers of "
                f"blocks from 1 to num_layers={self.num_layers}"
            )

    def _check_decoder(self) -> None:
        if self.channels != doubling_widths(self.channels[0]):
            raise ValueError(
                f"channels={self.channels}: must be {NUM_STAGES} widths, each twice the one before"
            )
        if self.block == "conv" and self.channels[0] < 2:
            raise ValueError(f"channels={self.channels}: must be at least 2")
        if self.norm == "group":
            groups = integer("norm_groups", self.norm_groups)
            if self.channels[0] % groups:
                raise ValueError(f"norm_groups={groups}: must divide channels={self.channels}")
        elif self.norm_groups is not None:
            raise ValueError(f"norm_groups={self.norm_groups}: must be None with norm={self.norm}")

    @property
    def spatial_rank(self) -> int:
        """Number of spatial axes."""
        return len(self.img_size)

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Patches per axis."""
        return tuple(s // p for s, p in zip(self.img_size, self.patch_size, strict=True))

    @property
    def num_patches(self) -> int:
        """Tokens of the transformer, N in the paper."""
        return math.prod(self.grid_size)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def family_spec(self) -> FamilySpec:
        """Properties that all models of the family have in common."""
        return FAMILY_SPECS[self.family]

    @property
    def attention_scale(self) -> float:
        """Factor on the attention energies: 1/sqrt of the hidden size or of a head's width."""
        return 1 / math.sqrt(self.head_dim if self.family_spec.scale_by_head else self.hidden_size)

    @property
    def block_style(self) -> BlockStyle:
        """Kind and options of the decoder's blocks."""
        return BlockStyle(self.block, self.norm, self.norm_groups, self.norm_affine)

    @property
    def decoder_stages(self) -> tuple[DecoderStage, ...]:
        """Specification of the decoder's stages, coarsest first (paper, figure 2)."""
        return decoder_stages(
            self.channels, self.patch_size, self.block_style, self.skip_convs, self.family_spec
        )
