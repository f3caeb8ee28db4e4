"""Which PyTorch module is which Flax module, as data.

A row pairs the two names of a module and says what kind it is; kinds are made of smaller kinds
down to arrays, so that one table serves the conversion of weights and the comparison of outputs.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from unetr_flax.config import UNETRConfig
from unetr_flax.weights import layouts
from unetr_flax.weights.layouts import Layout

# Module by module: PyTorch name, Flax path, kind. {layer} counts the transformer blocks from 0.
REFERENCE = (
    ("embedding", "encoder/embedding", "embedding"),
    ("transformer.layers.{layer}.0.norm", "encoder/block_{layer}/norm1", "norm"),
    ("transformer.layers.{layer}.0.fn", "encoder/block_{layer}/attention", "attention"),
    ("transformer.layers.{layer}.1.norm", "encoder/block_{layer}/norm2", "norm"),
    ("transformer.layers.{layer}.1.fn", "encoder/block_{layer}/feed_forward", "feed_forward"),
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

# What a kind of module holds: PyTorch name, Flax name, kind.
PARTS = {
    "embedding": (("patch_embeddings", "projection", "conv"),),
    "attention": (("qkv", "qkv", "qkv"), ("projection", "projection", "projection")),
    "feed_forward": (("0", "expand", "linear"), ("3", "contract", "linear")),
    "single_conv": (("block", "", "conv"),),
    "single_deconv": (("block", "", "deconv"),),
    "conv_block": (("block.0", "conv", "single_conv"), ("block.1", "norm", "batch_norm")),
    "deconv_block": (
        ("block.0", "deconv", "single_deconv"),
        ("block.1", "conv", "single_conv"),
        ("block.2", "norm", "batch_norm"),
    ),
}

# What a kind of module owns itself: PyTorch name, Flax collection, Flax name, layout.
ARRAYS = {
    "embedding": (("position_embeddings", "params", "position_embedding", layouts.SAME),),
    "linear": (
        ("weight", "params", "kernel", layouts.LINEAR),
        ("bias", "params", "bias", layouts.SAME),
    ),
    "qkv": (
        ("weight", "params", "kernel", layouts.QKV_WEIGHT),
        ("bias", "params", "bias", layouts.QKV_BIAS),
    ),
    "projection": (
        ("weight", "params", "kernel", layouts.PROJECTION),
        ("bias", "params", "bias", layouts.SAME),
    ),
    "conv": (
        ("weight", "params", "kernel", layouts.CONV),
        ("bias", "params", "bias", layouts.SAME),
    ),
    "deconv": (
        ("weight", "params", "kernel", layouts.DECONV),
        ("bias", "params", "bias", layouts.SAME),
    ),
    "norm": (
        ("weight", "params", "scale", layouts.SAME),
        ("bias", "params", "bias", layouts.SAME),
    ),
    "batch_norm": (
        ("weight", "params", "scale", layouts.SAME),
        ("bias", "params", "bias", layouts.SAME),
        ("running_mean", "batch_stats", "mean", layouts.SAME),
        ("running_var", "batch_stats", "var", layouts.SAME),
    ),
}

# PyTorch counts batches for an option that UNETR does not use; Flax has nothing to put there.
IGNORED_SUFFIX = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class ModulePair:
    """A module of both models: its PyTorch name, its Flax path, its kind."""

    torch_name: str
    flax_path: tuple[str, ...]
    kind: str


@dataclasses.dataclass(frozen=True)
class ArrayPair:
    """An array of both models: its key in the state dict, its path in the variables, its layout."""

    torch_key: str
    flax_path: tuple[str, ...]
    layout: Layout


def module_pairs(cfg: UNETRConfig) -> Iterator[ModulePair]:
    """Every module that both models have, outer before inner, block by block."""
    for repeated, rows in itertools.groupby(REFERENCE, key=lambda row: "{layer}" in row[0]):
        block = list(rows)
        for layer in range(cfg.num_layers if repeated else 1):
            for torch_name, flax_path, kind in block:
                path = tuple(flax_path.format(layer=layer).split("/"))
                yield from with_parts(ModulePair(torch_name.format(layer=layer), path, kind))


def with_parts(module: ModulePair) -> Iterator[ModulePair]:
    """A module and all that it is made of, outer before inner."""
    yield module
    for torch_name, flax_name, kind in PARTS.get(module.kind, ()):
        # An empty name: Flax has no module of its own there, the outer one holds the arrays.
        path = (*module.flax_path, flax_name) if flax_name else module.flax_path
        yield from with_parts(ModulePair(_join(module.torch_name, torch_name), path, kind))


def array_pairs(modules: Iterable[ModulePair]) -> list[ArrayPair]:
    """The arrays that the modules own, once each."""
    return [
        ArrayPair(
            _join(module.torch_name, torch_name), (collection, *module.flax_path, name), layout
        )
        for module in modules
        for torch_name, collection, name, layout in ARRAYS.get(module.kind, ())
    ]


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
