"""Convolutions with the parameters and results of `nn.Conv`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.conv3x3x3.api import conv3x3x3
from unetr_flax.ops.conv3x3x3.operands import Operands
from unetr_flax.ops.dtypes import add_bias, at_least_float32
from unetr_flax.ops.features import (
    DeferredNorm,
    DeferredUpsample,
    Features,
    Part,
    concatenated,
    conv_operands,
    parts,
)
from unetr_flax.ops.linear import linear
from unetr_flax.ops.patches import space_to_depth
from unetr_flax.ops.platform import Lowering


class Conv(nn.Conv):
    """`nn.Conv` with faster lowerings of the convolutions that UNETR uses.

    Fields, parameters and result are those of `nn.Conv`. Two kinds have lowerings of their own:
    kernels that equal their stride (patches, and 1x1x1) become a matrix product, and 3x3x3 kernels
    of stride 1 the fastest form for each platform.

    Attributes:
      lowering: "auto", or "xla" for XLA's own convolution throughout.

    Raises:
      ValueError: if padding is neither "SAME" nor "VALID", or dilation, groups, masks or batch axes
        other than the first are asked for.
    """

    lowering: Lowering = "auto"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes [N, *spatial, C] -> [N, *spatial / strides, features]."""
        kernel_size = self.kernel_size
        kernel_size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        axes = len(kernel_size)
        strides = 1 if self.strides is None else self.strides
        strides = (strides,) * axes if isinstance(strides, int) else tuple(strides)
        padding = self.padding
        dilations = (self.input_dilation, self.kernel_dilation)
        if (
            not isinstance(padding, str)
            or padding not in ("SAME", "VALID")
            or any(d not in (None, 1) for d in dilations)
            or self.feature_group_count != 1
            or self.mask is not None
            or inputs.ndim != axes + 2
        ):
            raise ValueError(
                f"padding={padding!r}, input of {inputs.ndim - 2} spatial axes: must be "
                f"'SAME' or 'VALID' and {axes}, without dilation, groups and mask"
            )
        shape = (*kernel_size, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        if self.lowering == "xla":
            operands: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
            x, kernel, bias = operands
            y = xla_conv(x, kernel, strides, padding, self.precision)
            return add_bias(y, bias)
        x, kernel, bias = self._promoted((conv_operands(inputs), kernel, bias))
        return conv(x, kernel, bias, strides, padding, self.precision)

    def _promoted(self, operands: Any) -> Any:
        """Casts the operands to one dtype; of a deferred norm only the result is cast."""
        leaves, structure = jax.tree.flatten(operands, is_leaf=_is_norm)
        stand_ins = [jnp.zeros((), leaf.dtype) if _is_norm(leaf) else leaf for leaf in leaves]
        promoted: Any = self.promote_dtype(*stand_ins, dtype=self.dtype)
        pairs = zip(leaves, promoted, strict=True)
        leaves = [a.replace(dtype=b.dtype) if _is_norm(a) else b for a, b in pairs]
        return jax.tree.unflatten(structure, leaves)


def conv(
    x: Features,
    kernel: jax.Array,
    bias: jax.Array | None,
    strides: tuple[int, ...],
    padding: str,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Convolves [N, *spatial, I] with [*K, I, O] and adds [O]; see `features.conv_operands`."""
    *kernel_size, _, features = kernel.shape
    if kernel_size == [3, 3, 3] and strides == (1, 1, 1) and padding == "SAME":
        *own, last = parts(x)
        if isinstance(last, DeferredUpsample):
            return conv3x3x3(Operands(_as_one(tuple(own)), last, kernel, bias), precision)
        return conv3x3x3(Operands(_as_one((*own, last)), None, kernel, bias), precision)
    if set(kernel_size) == set(strides) == {1}:
        arrays = (p.array() if isinstance(p, DeferredNorm) else p for p in parts(x))
        return _pointwise(tuple(arrays), kernel.reshape(-1, features), bias, precision)
    array = concatenated(x)
    if tuple(kernel_size) == strides and not any(map(int.__mod__, array.shape[1:-1], kernel_size)):
        patches = space_to_depth(array, kernel_size)
        return _pointwise((patches,), kernel.reshape(-1, features), bias, precision)
    return add_bias(xla_conv(array, kernel, strides, padding, precision), bias)


def xla_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: str,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Convolves [N, *spatial, I] with [*K, I, O] by XLA's own operation."""
    axes = tuple(range(1, x.ndim - 1))
    return lax.conv_general_dilated(
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


def _is_norm(part: Any) -> bool:
    return isinstance(part, DeferredNorm)


def _as_one(parts: tuple[Part, ...]) -> jax.Array | DeferredNorm | None:
    """Concatenates all parts; a single norm stays deferred, and no parts are None."""
    if len(parts) == 1 and isinstance(parts[0], DeferredNorm):
        return parts[0]
    return concatenated(parts) if parts else None


def _pointwise(
    parts: tuple[jax.Array | DeferredUpsample[jax.Array], ...],
    kernel: jax.Array,
    bias: jax.Array | None,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Applies a linear map [I, O], [O] to the channels of each voxel, part by part."""
    if len(parts) == 1 and not isinstance(parts[0], DeferredUpsample):
        return linear(parts[0], kernel, bias, precision, kernel.dtype)
    wide = at_least_float32(kernel.dtype)
    total: Any = 0 if bias is None else bias.astype(wide)
    start = 0
    for part in parts:
        own = kernel[start : start + part.shape[-1]]
        start += part.shape[-1]
        if isinstance(part, DeferredUpsample):
            # Two linear maps in a row are one.
            inner = None if part.bias is None else part.bias @ own
            total += part.replace(kernel=part.kernel @ own, bias=inner).array().astype(wide)
        else:
            total += linear(part, own, None, precision, wide)
    return total.astype(kernel.dtype)
