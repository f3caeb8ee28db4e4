"""Deconvolutions with the parameters and results of `nn.ConvTranspose`."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unetr_flax.ops.dtypes import add_bias
from unetr_flax.ops.features import DeferredUpsample, remember
from unetr_flax.ops.platform import Lowering
from unetr_flax.ops.upsample import xla
from unetr_flax.ops.upsample.api import upsample


class ConvTranspose(nn.ConvTranspose):
    """`nn.ConvTranspose` for kernels that equal their stride, whose windows do not overlap.

    Fields, parameters and result are those of `nn.ConvTranspose`.

    Attributes:
      lowering: "auto", or "xla" for XLA's own transposed convolution.

    Raises:
      ValueError: if the kernel is not the stride, or padding not "VALID", or masks, dilation or a
        transposed kernel are asked for.
    """

    lowering: Lowering = "auto"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes [*batch, *spatial, C] -> [*batch, *(spatial * strides), features]."""
        kernel_size = self.kernel_size
        kernel_size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        strides = 1 if self.strides is None else self.strides
        strides = (strides,) * len(kernel_size) if isinstance(strides, int) else tuple(strides)
        if strides != kernel_size or self.padding != "VALID":
            raise ValueError(
                f"strides={self.strides}, padding={self.padding!r}: must be kernel_size="
                f"{kernel_size} and 'VALID'"
            )
        dilation = self.kernel_dilation
        if self.mask is not None or dilation not in (None, 1) or self.transpose_kernel:
            raise ValueError("mask, kernel_dilation, transpose_kernel: must be left out")
        shape = (*kernel_size, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        operands: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        x, kernel, bias = operands
        batch = x.shape[: -len(shape) + 1]
        if len(batch) != 1:
            x = x.reshape(math.prod(batch), *x.shape[len(batch) :])
        options = (self.precision, self.preferred_element_type)
        if self.lowering == "xla":
            y = xla.upsample(x, kernel, *options)
            y = add_bias(y, bias)
            return y.reshape(*batch, *y.shape[1:])
        # The kernel of nn.ConvTranspose slides over its input, and so appears mirrored.
        kernel = jnp.flip(kernel, range(len(kernel_size)))
        y = upsample(x, kernel, *options)
        y = add_bias(y, bias)
        if len(batch) == 1 and self.preferred_element_type is None:
            # A cast would hide the norm that made the input.
            source = inputs if inputs.dtype == x.dtype else x
            return remember(y, DeferredUpsample(source, kernel, bias, self.precision))
        return y.reshape(*batch, *y.shape[1:])
