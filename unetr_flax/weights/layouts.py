"""Layouts: the order of an array's numbers in PyTorch and in Flax.

Axes: o output features, i input features, e width of the tokens, h heads, d width of a head, p0 to
p2 voxels of a patch, ... spatial axes.
"""

import dataclasses

import einops
import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of one array's numbers in both frameworks.

    Attributes:
      torch: axes in PyTorch, in the notation of einops.
      flax: axes in Flax.
      flip: whether the spatial axes run backwards in the other framework, as in transposed
        convolutions.
      swap: whether the two halves of the input features change places, as in a convolution of two
        arrays that are concatenated in the other order.
    """

    torch: str
    flax: str
    flip: bool = False
    swap: bool = False

    def to_flax(self, array: np.ndarray, **sizes: int) -> np.ndarray:
        """Returns a copy of PyTorch's array in Flax's order.

        Args:
          array: PyTorch's array.
          **sizes: sizes of axes that the array's shape does not tell, such as the heads h.
        """
        array = einops.rearrange(array, f"{self.torch} -> {self.flax}", **self._used(sizes))
        return np.array(self._reordered(array), order="C")

    def to_torch(self, array: np.ndarray, **sizes: int) -> np.ndarray:
        """Returns a copy of Flax's array in PyTorch's order, the inverse of `to_flax`."""
        array = self._reordered(array)
        array = einops.rearrange(array, f"{self.flax} -> {self.torch}", **self._used(sizes))
        return np.array(array, order="C")

    def _reordered(self, array: np.ndarray) -> np.ndarray:
        # Flipping and swapping are their own inverses, so one function serves both directions.
        if self.flip:
            array = np.flip(array, axis=tuple(range(array.ndim - 2)))
        if self.swap:
            array = np.roll(array, array.shape[-2] // 2, axis=-2)
        return array

    def _used(self, sizes: dict[str, int]) -> dict[str, int]:
        # einops refuses the size of an axis that a pattern does not have.
        axes = self.flax.split()
        return {name: size for name, size in sizes.items() if name in axes}


IDENTITY = Layout("...", "...")
LINEAR = Layout("o i", "i o")
CONV = Layout("o i ...", "... i o")
CONV_OF_CONCATENATION = Layout("o i ...", "... i o", swap=True)
DECONV = Layout("i o ...", "... i o", flip=True)
PROJECTION = Layout("e (h d)", "h d e")

# Queries, keys and values: innermost in the output features, outermost, or three stacked arrays.
QKV_WEIGHT = Layout("(h d qkv) e", "e qkv h d")
QKV_BIAS = Layout("(h d qkv)", "qkv h d")
QKV_OUTER_WEIGHT = Layout("(qkv h d) e", "e qkv h d")
QKV_OUTER_BIAS = Layout("(qkv h d)", "qkv h d")
QKV_STACKED_WEIGHT = Layout("qkv (h d) e", "e qkv h d")
QKV_STACKED_BIAS = Layout("qkv (h d)", "qkv h d")


def perceptron(spatial_rank: int) -> Layout:
    """Returns the layout of a linear map of flattened patches, which Flax has as a convolution."""
    patch = " ".join(f"p{axis}" for axis in range(spatial_rank))
    return Layout(f"o ({patch} i)", f"{patch} i o")
