"""A site: a module, or what stands between two, with its values in both models.

A site has what its definition needs: the inputs on which both models computed it, the weights, and
the settings that the configuration asks for.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.places import find_places, weights_of
from unetr_flax.parity.record import Recording


@dataclasses.dataclass(frozen=True)
class Site:
    """One module, or what stands between two.

    Attributes:
      name: PyTorch name of the module, or of the module that the value goes to.
      what: "" for a module's own output, else what stands before or in it, such as "attention".
      kind: name of its definition in `causes.DEFINITIONS`.
      arrays: inputs and weights in PyTorch's layouts, by the names in the definition.
      right: settings of the definition that the configuration asks for.
      ours: the Flax model's value.
      theirs: the PyTorch model's value.
      own: the Flax model's inputs, where they differ from those in `arrays`.
    """

    name: str
    what: str
    kind: str
    arrays: Mapping[str, np.ndarray]
    right: Mapping[str, Any]
    ours: np.ndarray
    theirs: np.ndarray
    own: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Values:
    """Both recordings, and the weights by PyTorch's names; attributes as in `find_sites`."""

    cfg: UNETRConfig
    image: np.ndarray
    ours: Recording
    theirs: Recording
    state: Mapping[str, np.ndarray]
    mask: np.ndarray | None
    train: bool
    parts: frozenset[str]

    def wants(self, part: str) -> bool:
        return part in self.parts

    def __post_init__(self):
        self.leaves, self.blocks = find_places(self.cfg)

    def into(self, path: str) -> np.ndarray:
        return self.theirs.inputs[path]

    def out(self, path: str) -> np.ndarray:
        """Returns PyTorch's result; of a norm, before the activation."""
        return self.theirs.outputs[path]

    def name(self, path: str) -> str:
        return {**self.blocks, **self.leaves}[path].name

    def own(self, path: str) -> str:
        """Returns the path of the map in a deconvolution, which may have a folder of its own."""
        inner = f"{path}/deconv"
        return inner if inner in self.leaves else path

    def given(
        self, path: str, what: str, kind: str, arrays: Any, *, block: str = "", **right: Any
    ) -> Iterator[Site]:
        """Yields the site of what stands before a module, or before the block that it begins."""
        key = f"{block} block" if f"{block} block" in self.ours.inputs else path
        if key in self.ours.inputs and path in self.theirs.inputs:
            values = self.ours.inputs[key], self.theirs.inputs[path]
            yield Site(self.name(path), what, kind, arrays, right, *values)
        if key != path:
            yield from self.given(path, "input", "direct", {"x": self.into(path)})

    def made(self, path: str, kind: str, arrays: Any = None, **right: Any) -> Iterator[Site]:
        """Yields the site of a module that is compared alone."""
        if path in self.ours.outputs and path in self.theirs.outputs:
            arrays = dict(arrays or {}, **weights_of(self.leaves[path], self.state, self.cfg))
            arrays.setdefault("x", self.into(path))
            values = self.ours.outputs[path], self.theirs.outputs[path]
            yield Site(self.name(path), "", kind, arrays, right, *values)
