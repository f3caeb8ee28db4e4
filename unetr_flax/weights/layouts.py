"""How one array lies in PyTorch and in Flax. Each layout is its own inverse's data.

Axes: o output and i input features, e tokens' width, h heads, d head size, ... spatial axes.
"""

import dataclasses

import einops
import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """The same numbers in two orders.

    Attributes:
      torch: axes in PyTorch, in the notation of einops.
      flax: axes in Flax.
      flip: whether the spatial axes run backwards, as those of deconvolutions do.
    """

    torch: str
    flax: str
    flip: bool = False

    def to_flax(self, array: np.ndarray, **sizes: int) -> np.ndarray:
        """PyTorch's array in Flax's order, copied; `sizes` are those that the array cannot tell."""
        array = einops.rearrange(array, f"{self.torch} -> {self.flax}", **self._used(sizes))
        if self.flip:
            array = np.flip(array, axis=tuple(range(array.ndim - 2)))
        return np.array(array, order="C")

    def to_torch(self, array: np.ndarray, **sizes: int) -> np.ndarray:
        """The inverse of `to_flax`."""
        if self.flip:
            array = np.flip(array, axis=tuple(range(array.ndim - 2)))
        array = einops.rearrange(array, f"{self.flax} -> {self.torch}", **self._used(sizes))
        return np.array(array, order="C")

    def _used(self, sizes: dict[str, int]) -> dict[str, int]:
        # einops refuses the size of an axis that a pattern does not have.
        axes = self.flax.split()
        return {name: size for name, size in sizes.items() if name in axes}


SAME = Layout("...", "...")
LINEAR = Layout("o i", "i o")
CONV = Layout("o i ...", "... i o")
DECONV = Layout("i o ...", "... i o", flip=True)
QKV_WEIGHT = Layout("(h d qkv) e", "e qkv h d")
QKV_BIAS = Layout("(h d qkv)", "qkv h d")
PROJECTION = Layout("e (h d)", "h d e")
