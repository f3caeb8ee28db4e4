"""What a table of names says: which PyTorch module is which Flax module, and what each holds.

A row pairs the two names of a module and says what kind it is; kinds are made of smaller kinds
down to arrays, so that one table serves the conversion of weights and the comparison of outputs.
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
    """The names of one family of models.

    Attributes:
      rows: module by module, in order of depth.
      parts: what a kind of module is made of, as rows relative to it. An empty Flax name: Flax has
        no module of its own there, the outer one holds the arrays.
      arrays: what a kind of module owns itself.
    """

    rows: tuple[Row, ...]
    parts: Mapping[str, tuple[Row, ...]]
    arrays: Mapping[str, tuple[Array, ...]]


def weight(name: str, layout: Layout) -> Array:
    """A parameter that PyTorch calls "weight"."""
    return ("weight", "params", name, layout)


def bias(layout: Layout = layouts.IDENTITY) -> Array:
    """A parameter that both call "bias"."""
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
