"""Deconvolutions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from unetr_flax.ops.features import DeferredNorm, DeferredUpsample, normalized
from unetr_flax.ops.upsample.api import upsample


class ConvTranspose(nn.ConvTranspose):
    """`nn.ConvTranspose` whose kernel is its stride: one matrix product, then one transposition.

    Fields, parameters and result are those of `nn.ConvTranspose`.

    Raises:
      ValueError: if the kernel is not the stride, or padding not "VALID", or masks, dilation or a
        transposed kernel are asked for.
    """

    @nn.compact
    def __call__(
        self, inputs: jax.Array | DeferredNorm, *, deferred: bool = False
    ) -> jax.Array | DeferredUpsample:
        """[*batch, *spatial, C] -> [*batch, *(spatial * strides), features].

        Args:
          inputs: one batch axis if deferred.
          deferred: whether to leave the computation to the convolution that follows.
        """
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
        dtype = self.dtype
        if isinstance(inputs, DeferredNorm) and deferred:
            kernel, bias = self.promote_dtype(kernel, bias, dtype=dtype or inputs.dtype)
        else:
            inputs = normalized(inputs)
            inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=dtype)
        # A transposed convolution of nn.ConvTranspose slides its kernel, so it lands mirrored.
        kernel = jnp.flip(kernel, range(len(kernel_size)))
        if deferred:
            return DeferredUpsample(inputs, kernel, bias, self.precision)
        batch = inputs.shape[: -len(shape) + 1]
        inputs = inputs.reshape(math.prod(batch), *inputs.shape[len(batch) :])
        y = upsample(inputs, kernel, self.precision, self.preferred_element_type)
        y = y.reshape(*batch, *y.shape[1:])
        return y if bias is None else y + bias
