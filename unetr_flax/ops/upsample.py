"""Up-sampling by deconvolutions whose windows do not overlap."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops.patches import depth_to_space, space_to_depth


class ConvTranspose(nn.ConvTranspose):
    """`nn.ConvTranspose` whose kernel is its stride: one matrix product, then one transposition.

    Fields, parameters and result are those of `nn.ConvTranspose`.

    Raises:
      ValueError: if the kernel is not the stride, or padding not "VALID", or masks, dilation or a
        transposed kernel are asked for.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[*batch, *spatial, C] -> [*batch, *(spatial * strides), features]."""
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
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        batch = inputs.shape[: -len(shape) + 1]
        inputs = inputs.reshape(math.prod(batch), *inputs.shape[len(batch) :])
        # A transposed convolution of nn.ConvTranspose slides its kernel, so it lands mirrored.
        kernel = jnp.flip(kernel, range(len(kernel_size)))
        y = _upsample(inputs, kernel, self.precision, self.preferred_element_type)
        y = y.reshape(*batch, *y.shape[1:])
        return y if bias is None else y + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _upsample(
    x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike, result: DTypeLike | None
) -> jax.Array:
    """out[2i + a] = x[i] kernel[a] on each axis: [N, *S, I], [*P, I, O] -> [N, *(S * P), O]."""
    *patch, inputs, features = kernel.shape
    columns = jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)  # [I, *P O]
    y = jnp.matmul(x, columns, precision=precision, preferred_element_type=result)
    return depth_to_space(y, patch, features)


def _upsample_fwd(x, kernel, precision, result):
    return _upsample(x, kernel, precision, result), (x, kernel)


def _upsample_bwd(precision, result, residuals, grad):
    x, kernel = residuals
    *patch, inputs, features = kernel.shape
    # Without the barrier the permutation would be computed in each of the two products.
    grad = lax.optimization_barrier(space_to_depth(grad.astype(x.dtype), patch))  # [N, *S, *P O]
    columns = jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)  # [I, *P O]
    x_grad = jnp.matmul(grad, columns.T, precision=precision)
    columns_grad = jnp.matmul(
        x.reshape(-1, inputs).T, grad.reshape(-1, grad.shape[-1]), precision=precision
    )
    return x_grad, jnp.moveaxis(columns_grad.reshape(inputs, *patch, features), 0, -2)


_upsample.defvjp(_upsample_fwd, _upsample_bwd)
