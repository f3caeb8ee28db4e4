"""The plain 3x3x3 convolution, XLA's own, for GPUs and all platforms without a tuned one."""

import jax
from jax import lax

from unetr_flax.ops.conv3x3x3.operands import ArrayOperands, Operands, backward_as_one, mirrored
from unetr_flax.ops.dtypes import add_bias
from unetr_flax.ops.reductions import channel_sums

LAYOUT = lax.ConvDimensionNumbers((0, 4, 1, 2, 3), (4, 3, 0, 1, 2), (0, 4, 1, 2, 3))


def forward(
    operands: ArrayOperands, *, precision: lax.PrecisionLike, differentiated: bool
) -> jax.Array:
    """Computes [N, D, H, W, O]."""
    x, _, kernel, bias = operands.as_one()
    y = convolve(x, kernel, precision)
    return add_bias(y, bias)


def backward(
    operands: ArrayOperands, grad: jax.Array, *, precision: lax.PrecisionLike
) -> ArrayOperands:
    """Computes the gradients of the operands."""

    def gradients(operands, grad):
        x, _, kernel, bias = operands
        return Operands(
            convolve(grad, mirrored(kernel), precision),
            None,
            kernel_grad(x, grad, precision),
            None if bias is None else channel_sums(grad).astype(bias.dtype),
        )

    return backward_as_one(gradients, operands, grad)


def convolve(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """Computes [N, D, H, W, I], [3, 3, 3, I, O] -> [N, D, H, W, O]."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=LAYOUT, precision=precision
    )


def kernel_grad(x: jax.Array, grad: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """Computes [N, D, H, W, I], [N, D, H, W, O] -> [3, 3, 3, I, O]."""
    shape = jax.ShapeDtypeStruct((3, 3, 3, x.shape[-1], grad.shape[-1]), x.dtype)
    transpose = jax.linear_transpose(lambda k: convolve(x, k, precision), shape)
    return transpose(grad)[0]
