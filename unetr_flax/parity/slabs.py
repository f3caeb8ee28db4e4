"""PyTorch's convolutions in float64, computed in slabs of the volume to bound their memory.

On CPU PyTorch unfolds the whole input of a float64 convolution: 27 numbers for each one of a kernel
of 3 x 3 x 3, which is 6 GB for 32 channels of 96^3. Slabs give the same numbers, bit for bit.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# Bytes of an unfolded slab.
SLAB_BYTES = 2**29


class ConvolutionsInSlabs(TorchFunctionMode):
    """A context in which 3D convolutions in float64 on CPU unfold a slab at a time."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls a function of PyTorch, or computes it in slabs."""
        del types
        kwargs = kwargs or {}
        if func is F.conv3d:
            convolution = _Convolution(*args, **kwargs)
            if convolution.planes is not None:
                return convolution.in_slabs(convolution.planes)
        return func(*args, **kwargs)


class _Convolution(NamedTuple):
    """The arguments of a convolution [B, C, D, H, W] -> [B, O, D', H', W']."""

    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def planes(self) -> int | None:
        """How many planes of the result a slab has; None if slabs are not of use."""
        x = self.input
        if x.ndim != 5 or x.dtype != torch.float64 or x.device.type != "cpu":
            return None
        if isinstance(self.padding, str):
            return None
        if {*_three(self.stride), *_three(self.dilation), self.groups} != {1}:
            return None
        unfolded = 8 * x.shape[0] * self.weight[0].numel() * x.shape[3] * x.shape[4]
        planes = max(1, SLAB_BYTES // unfolded)
        return planes if planes < x.shape[2] else None

    def in_slabs(self, planes: int) -> torch.Tensor:
        """Computes some planes D' at a time."""
        depth, *others = _three(self.padding)
        x = F.pad(self.input, (0, 0, 0, 0, depth, depth))
        halo = self.weight.shape[2] - 1
        slabs = [
            F.conv3d(
                x[:, :, start : start + planes + halo], self.weight, self.bias, padding=(0, *others)
            )
            for start in range(0, x.shape[2] - halo, planes)
        ]
        return torch.cat(slabs, 2)


def _three(value: Any) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 3 if len(values) == 1 else values
