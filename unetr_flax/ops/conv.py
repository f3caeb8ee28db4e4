"""Convolutions.

Parameters and results are those of `nn.Conv`; only the operations that compute them differ.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.conv3x3x3.api import conv3x3x3
from unetr_flax.ops.conv3x3x3.operands import Operands
from unetr_flax.ops.features import (
    DeferredNorm,
    DeferredUpsample,
    Features,
    channels,
    joined,
    normalized,
    parts,
    rank,
)
from unetr_flax.ops.linear import linear
from unetr_flax.ops.patches import space_to_depth


class Conv(nn.Conv):
    """`nn.Conv`, lowered well where UNETR uses it.

    Fields, parameters and result are those of `nn.Conv`. Two kinds are lowered otherwise: kernels
    that are their own stride (patches, and 1x1x1) to a matrix product, and 3x3x3 kernels of stride
    1 as each platform does them best.

    Raises:
      ValueError: if padding is neither "SAME" nor "VALID", or dilation, groups, masks or batch axes
        other than the first are asked for.
    """

    @nn.compact
    def __call__(self, inputs: Features, *, keep: bool = False) -> jax.Array:
        """[N, *spatial, C] -> [N, *spatial / strides, features].

        Args:
          inputs: features.
          keep: whether the result has several uses, such as a norm's statistics.
        """
        kernel_size = tuple(self.kernel_size)
        axes = len(kernel_size)
        strides = (1,) * axes if self.strides in (None, 1) else tuple(self.strides)
        dilations = (self.input_dilation, self.kernel_dilation)
        if (
            self.padding not in ("SAME", "VALID")
            or any(d not in (None, 1) for d in dilations)
            or self.feature_group_count != 1
            or self.mask is not None
            or rank(inputs) != axes
        ):
            raise ValueError(
                f"padding={self.padding!r}, input of {rank(inputs)} spatial axes: must be 'SAME' "
                f"or 'VALID' and {axes}, without dilation, groups and mask"
            )
        shape = (*kernel_size, channels(inputs), self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = self._promoted((inputs, kernel, bias))
        return conv(inputs, kernel, bias, strides, self.padding, self.precision, keep)

    def _promoted(self, operands: Any) -> Any:
        """The operands in one dtype; norms keep theirs inside."""
        leaves, structure = jax.tree.flatten(operands, is_leaf=_is_norm)
        stand_ins = [jnp.zeros((), leaf.dtype) if _is_norm(leaf) else leaf for leaf in leaves]
        promoted = self.promote_dtype(*stand_ins, dtype=self.dtype)
        pairs = zip(leaves, promoted, strict=True)
        leaves = [a.replace(dtype=b.dtype) if _is_norm(a) else b for a, b in pairs]
        return jax.tree.unflatten(structure, leaves)


def _is_norm(part: Any) -> bool:
    return isinstance(part, DeferredNorm)


def conv(
    x: Features,
    kernel: jax.Array,
    bias: jax.Array | None,
    strides: tuple[int, ...],
    padding: str,
    precision: lax.PrecisionLike,
    keep: bool = False,
) -> jax.Array:
    """A convolution of [N, *spatial, I] with [*K, I, O], plus [O]."""
    *kernel_size, _, features = kernel.shape
    if kernel_size == [3, 3, 3] and strides == (1, 1, 1) and padding == "SAME":
        *own, last = parts(x)
        up = None
        if isinstance(last, DeferredUpsample):
            up = normalized(last)
        else:
            own.append(last)
        if not (len(own) == 1 and _is_norm(own[0])):
            own = [joined(tuple(own))] if own else [None]
        return conv3x3x3(Operands(own[0], up, kernel, bias), precision, keep)
    x = normalized(x)
    if set(kernel_size) == set(strides) == {1}:
        y = _of_each_voxel(x, kernel.reshape(-1, features), precision)
        return y if bias is None else y + bias
    x = joined(x)
    if tuple(kernel_size) == strides and not any(map(int.__mod__, x.shape[1:-1], kernel_size)):
        patches = space_to_depth(x, kernel_size)
        y = _of_each_voxel(patches, kernel.reshape(-1, features), precision)
    else:
        axes = tuple(range(1, x.ndim - 1))
        y = lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            dimension_numbers=lax.ConvDimensionNumbers(
                (0, x.ndim - 1, *axes),
                (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)),
                (0, x.ndim - 1, *axes),
            ),
            precision=precision,
        )
    return y if bias is None else y + bias


def _of_each_voxel(x: Features, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """A linear map [I, O] of the channels, part by part."""
    total, start = 0, 0
    for part in parts(x):
        own = kernel[start : start + part.shape[-1]]
        start += part.shape[-1]
        if isinstance(part, DeferredUpsample):  # two linear maps are one
            bias = None if part.bias is None else part.bias @ own
            total += part.replace(kernel=part.kernel @ own, bias=bias).array()
        else:
            y = linear(part.reshape(-1, part.shape[-1]), own, precision)
            total += y.reshape(*part.shape[:-1], -1)
    return total
