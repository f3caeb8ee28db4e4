"""Tables of names: which PyTorch module is which Flax module, and which arrays each of them owns.

A row pairs the two names of a module and says what kind of module it is. Kinds are made of smaller
kinds, down to arrays, so one table serves the conversion of weights and the comparison of outputs.
"""

import dataclasses
from collections.abc import Mapping

from unetr_flax.weights import layouts
from unetr_flax.weights.layouts import Layout

# PyTorch name, Flax path, kind. {layer} counts the transformer blocks from 0.
Row = tuple[str, str, str]
# PyTorch name (or names, whose arrays Flax stacks), Flax collection, Flax path, layout.
Array = tuple[str | tuple[str, ...], str, str, Layout]


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of all modules and arrays of a model.

    The comparison of outputs knows the kinds "embedding", "perceptron_embedding", "attention",
    "qkv", "projection", "norm", "feed_forward" and "linear", whose outputs are tokens; "batch_norm"
    and "channel_norm", which Flax computes with the activation that follows; and takes the outputs
    of all other kinds for grids of voxels.

    Attributes:
      rows: the outermost modules, in order of depth.
      parts: the modules that a kind is made of, as rows relative to it. An empty Flax name means
        that Flax has no such module and the outer one owns the arrays.
      arrays: the arrays that a kind owns itself.
    """

    rows: tuple[Row, ...]
    parts: Mapping[str, tuple[Row, ...]]
    arrays: Mapping[str, tuple[Array, ...]]


def weight(name: str, layout: Layout) -> Array:
    """Returns the entry of a parameter that PyTorch calls "weight"."""
    return ("weight", "params", name, layout)


def bias(layout: Layout = layouts.IDENTITY) -> Array:
    """Returns the entry of a parameter that both frameworks call "bias"."""
    return ("bias", "params", "bias", layout)


KERNEL_OF_CONV = weight("kernel", layouts.CONV)
KERNEL_OF_DECONV = weight("kernel", layouts.DECONV)
SCALE = weight("scale", layouts.IDENTITY)
STATISTICS = (
    ("running_mean", "batch_stats", "mean", layouts.IDENTITY),
    ("running_var", "batch_stats", "var", layouts.IDENTITY),
)
POSITIONS = ("position_embeddings", "params", "position_embedding", layouts.IDENTITY)

# Kinds that are the same in all families.
LINEAR = (weight("kernel", layouts.LINEAR), bias())
PROJECTION = (weight("kernel", layouts.PROJECTION), bias())
LAYER_NORM = (SCALE, bias())
