"""PyTorch's convolutions in float64, computed in slabs of the volume to bound their memory.

On CPU PyTorch unfolds the whole input of a float64 convolution: 27 numbers for each one of a kernel
of 3 x 3 x 3, which is 6 GB for 32 channels of 96^3. Slabs give the same numbers, bit for bit.
"""

from collections.abc import Iterable, Mapping
from typing import Any

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
            planes = _planes(*args, **kwargs)
            if planes is not None:
                return _in_slabs(planes, *args, **kwargs)
        return func(*args, **kwargs)


def _planes(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> int | None:
    """Returns how many planes a slab of the result has; None if slabs are not of use."""
    del bias
    usual = all(set(_three(x)) == {1} for x in (stride, dilation)) and groups == 1
    if x.dtype != torch.float64 or x.device.type != "cpu" or not usual or isinstance(padding, str):
        return None
    unfolded = 8 * x.shape[0] * weight[0].numel() * x.shape[3] * x.shape[4]
    planes = max(1, SLAB_BYTES // unfolded)
    return planes if planes < x.shape[2] else None


def _in_slabs(
    planes: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Computes a convolution [B, C, D, H, W] -> [B, O, D', H', W'], some planes D' at a time."""
    del stride, dilation, groups  # All are 1.
    depth, *others = _three(padding)
    x = F.pad(x, (0, 0, 0, 0, depth, depth))
    halo = weight.shape[2] - 1
    slabs = [
        F.conv3d(x[:, :, start : start + planes + halo], weight, bias, padding=(0, *others))
        for start in range(0, x.shape[2] - halo, planes)
    ]
    return torch.cat(slabs, 2)


def _three(value: Any) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else tuple(value)
