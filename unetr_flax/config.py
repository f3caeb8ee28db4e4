"""What a UNETR is made of: every size and option, checked once, in one frozen record."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Self

# The decoder doubles the resolution four times, so a patch is at most 2**4 voxels along an axis.
NUM_STAGES = 4
PATCH_SIZES = tuple(2**k for k in range(NUM_STAGES + 1))


@dataclasses.dataclass(frozen=True)
class DecoderStage:
    """One resolution of the decoder: up-sample, join with a skip, convolve.

    Attributes:
      channels: width of the up-sampled features and of the skip that they are joined with.
      strides: up-sampling factor per axis on the way into this stage.
      skip_strides: up-sampling factors of the skip's own tower of deconvolutions, coarsest first;
        empty for the last stage, whose skip is computed from the image by convolutions.
      skip_channels: widths of the skip's blocks.
      fuse_channels: widths of the convolution blocks after the join.
    """

    channels: int
    strides: tuple[int, ...]
    skip_strides: tuple[tuple[int, ...], ...]
    skip_channels: tuple[int, ...]
    fuse_channels: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNETRConfig:
    """Sizes and options of a UNETR (Hatamizadeh et al. 2022, section 3.1).

    Build one with a preset, `UNETRConfig.reference`; the constructor takes the same facts resolved.

    Attributes:
      img_size: voxels per spatial axis; any number of axes.
      in_channels: channels of the image.
      out_channels: channels of the logits, one per class.
      patch_size: voxels per patch and axis, each 1, 2, 4, 8 or 16. An axis with a patch smaller
        than 16 is not up-sampled in the coarsest stages, so thin volumes keep their detail.
      hidden_size: width of the tokens, E in the paper.
      num_layers: transformer blocks.
      num_heads: attention heads; divides hidden_size.
      mlp_dim: width of the feed-forward layer.
      skip_layers: the four blocks (counted from 1) whose outputs feed the decoder; the last of
        them feeds its deepest stage, and blocks after it could have no effect.
      channels: widths of the decoder from full resolution to the coarsest, five numbers.
      dropout_rate: probability of dropping embeddings, attention weights and feed-forward units.

    Raises:
      ValueError: if the model cannot be built; the message names field, value and what is allowed.
    """

    img_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    patch_size: tuple[int, ...]
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    skip_layers: tuple[int, ...]
    channels: tuple[int, ...]
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
        """The model of `unetr_torch_ref.UNETR`: the paper's, its decoder `light_r` times narrower.

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
        img_size = _integers("img_size", img_size)
        if isinstance(patch_size, Sequence):
            patch_size = _integers("patch_size", patch_size)
        else:
            patch_size = (_integer("patch_size", patch_size),) * len(img_size)
        num_layers = _integer("num_layers", num_layers)
        if skip_layers is None:
            skip_layers = tuple(num_layers * i // NUM_STAGES for i in range(1, NUM_STAGES + 1))
        return cls(
            img_size=img_size,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_dim=4 * _integer("hidden_size", hidden_size) if mlp_dim is None else mlp_dim,
            skip_layers=tuple(skip_layers),
            channels=_reference_channels(light_r),
            dropout_rate=dropout_rate,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; also takes lists where JSON has turned tuples into them."""
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
            raise ValueError(f"UNETRConfig: missing fields {missing}, unknown fields {unknown}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: numbers and lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    def __post_init__(self):
        for name in ("img_size", "patch_size", "skip_layers", "channels"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        for name in (
            "in_channels",
            "out_channels",
            "hidden_size",
            "num_layers",
            "num_heads",
            "mlp_dim",
        ):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
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
        if len(self.channels) != NUM_STAGES + 1:
            raise ValueError(f"channels={self.channels}: must be {NUM_STAGES + 1} widths")
        if not isinstance(self.dropout_rate, (int, float)) or not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate={self.dropout_rate!r}: must be in [0, 1)")

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
    def attention_scale(self) -> float:
        """Factor on the attention energies; the reference divides by sqrt(E), not sqrt(E/heads)."""
        return 1 / math.sqrt(self.hidden_size)

    @property
    def decoder_stages(self) -> tuple[DecoderStage, ...]:
        """The decoder's channel plan, coarsest stage first (paper, figure 2)."""
        stem, *widths = self.channels
        widths = widths[::-1]
        # A patch of 2**k voxels needs k doublings, and they are the finest k of the four.
        strides = tuple(
            tuple(2 if patch >= 2 ** (NUM_STAGES - stage) else 1 for patch in self.patch_size)
            for stage in range(NUM_STAGES)
        )
        stages = []
        for i, (width, following) in enumerate(zip(widths, widths[1:] + widths[-1:], strict=True)):
            last = i == NUM_STAGES - 1
            stages.append(
                DecoderStage(
                    channels=width,
                    strides=strides[i],
                    skip_strides=() if last else strides[: i + 1],
                    skip_channels=(stem, width) if last else (width,) * (i + 1),
                    fuse_channels=(following,) * (3 if i == 0 else 2),
                )
            )
        return tuple(stages)


def _reference_channels(light_r: float) -> tuple[int, ...]:
    """Widths 32..512 divided by light_r as the reference does, which truncates."""
    full = tuple(32 * 2**i for i in range(NUM_STAGES + 2))
    if not isinstance(light_r, bool) and light_r > 0 and math.isfinite(light_r):
        channels = tuple(int(width / light_r) for width in full)
        joins_match = all(2 * a == b for a, b in itertools.pairwise(channels[1:]))
        if channels[0] >= 1 and joins_match:
            return channels[:-1]
    raise ValueError(
        f"light_r={light_r!r}: must be above 0, at most {full[0]} and leave each of the widths "
        f"{full[1:]} twice the one before, as 1, 2, 4, 8, 16 and 32 do"
    )


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: must be a positive integer") from None
    if number < 1:
        raise ValueError(f"{name}={value!r}: must be a positive integer")
    return number


def _integers(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
        raise ValueError(f"{name}={values!r}: must be a sequence of positive integers")
    return tuple(_integer(name, value) for value in values)
