"""The decoder as data: the style of its blocks and the specification of each stage."""

import dataclasses

from unetr_flax.model.choices import Block, Norm
from unetr_flax.model.family_spec import FamilySpec

# The decoder doubles the resolution four times, so a patch is at most 2**4 voxels along an axis.
NUM_STAGES = 4
PATCH_SIZES = tuple(2**k for k in range(NUM_STAGES + 1))


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """Kind and options of the decoder's convolution blocks.

    Attributes:
      block: "conv" (convolution, norm, ReLU), "basic" (convolution, norm and LeakyReLU, twice) or
        "residual" (basic, with a shortcut added before its last activation).
      norm: "batch", "instance" or "group".
      norm_groups: channel groups of a group norm; None for the others.
      norm_affine: whether norms scale and shift.
    """

    block: Block
    norm: Norm
    norm_groups: int | None
    norm_affine: bool

    @property
    def use_bias(self) -> bool:
        """True if convolutions and deconvolutions have biases; the last one always has."""
        return self.block == "conv"


# The article's blocks.
CONV_BLOCKS = BlockStyle(block="conv", norm="batch", norm_groups=None, norm_affine=True)


@dataclasses.dataclass(frozen=True)
class DecoderStage:
    """One resolution of the decoder: up-sample, concatenate a skip, convolve.

    Attributes:
      channels: width of the up-sampled features and of the skip.
      strides: up-sampling factor per axis on the way into this stage.
      skip_strides: up-sampling factors of the skip's own tower of deconvolutions, coarsest first;
        empty for the last stage, whose skip is computed from the image by convolutions.
      skip_channels: widths of the skip's blocks.
      skip_blocks: whether a convolution block follows each deconvolution of the skip's tower.
      fuse_channels: widths of the convolution blocks after the concatenation.
    """

    channels: int
    strides: tuple[int, ...]
    skip_strides: tuple[tuple[int, ...], ...]
    skip_channels: tuple[int, ...]
    skip_blocks: tuple[bool, ...]
    fuse_channels: tuple[int, ...]


def doubling_widths(width: int) -> tuple[int, ...]:
    """Returns the widths of the decoder's stages, finest first."""
    return tuple(width * 2**i for i in range(NUM_STAGES))


def decoder_stages(
    channels: tuple[int, ...],
    patch_size: tuple[int, ...],
    style: BlockStyle,
    skip_convs: bool,
    family: FamilySpec,
) -> tuple[DecoderStage, ...]:
    """Builds the stages, coarsest first.

    Args:
      channels: widths of the stages, finest first.
      patch_size: voxels per patch and axis.
      style: kind and options of the blocks.
      skip_convs: whether convolution blocks follow the up-sampling of skips.
      family: properties of the family.
    """
    widths = channels[::-1]
    # A patch of 2**k voxels needs k doublings, which are the finest k of the four stages.
    strides = tuple(
        tuple(2 if patch >= 2 ** (NUM_STAGES - stage) else 1 for patch in patch_size)
        for stage in range(NUM_STAGES)
    )
    simple = style.block == "conv"
    stages = []
    for i, (width, following) in enumerate(zip(widths, widths[1:] + widths[-1:], strict=True)):
        if i == NUM_STAGES - 1:
            skip_strides, skip_blocks = (), ()
            skip_channels = (width // 2, width) if simple else (width,)
        else:
            skip_strides = strides[: i + 1]
            skip_channels = widths[: i + 1] if family.tapering_skips else (width,) * (i + 1)
            skip_blocks = (simple,) + (skip_convs,) * i
        fused = following if family.early_narrowing else width
        blocks = (3 if i == 0 else 2) if simple else 1
        stages.append(
            DecoderStage(
                channels=width,
                strides=strides[i],
                skip_strides=skip_strides,
                skip_channels=skip_channels,
                skip_blocks=skip_blocks,
                fuse_channels=(fused,) * blocks,
            )
        )
    return tuple(stages)
