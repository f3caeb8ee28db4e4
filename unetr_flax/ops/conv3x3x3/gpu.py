"""The 3x3x3 convolution on GPU, and wherever no other is better: XLA's own."""

import jax
from jax import lax

from unetr_flax.ops.conv3x3x3.operands import Operands, backward_as_one, mirrored
from unetr_flax.ops.reductions import channel_sums

LAYOUT = lax.ConvDimensionNumbers((0, 4, 1, 2, 3), (4, 3, 0, 1, 2), (0, 4, 1, 2, 3))


def forward(operands: Operands, *, precision: lax.PrecisionLike, keep: bool) -> jax.Array:
    """[N, D, H, W, O]."""
    x, _, kernel, bias = operands.as_one()
    y = native(x, kernel, precision)
    return y if bias is None else y + bias


def backward(operands: Operands, grad: jax.Array, *, precision: lax.PrecisionLike) -> Operands:
    """The gradients of the operands."""

    def gradients(operands, grad):
        x, _, kernel, bias = operands
        return Operands(
            native(grad, mirrored(kernel), precision),
            None,
            native_kernel_grad(x, grad, precision),
            None if bias is None else channel_sums(grad).astype(bias.dtype),
        )

    return backward_as_one(gradients, operands, grad)


def native(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """[N, D, H, W, I], [3, 3, 3, I, O] -> [N, D, H, W, O]."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=LAYOUT, precision=precision
    )


def native_kernel_grad(x: jax.Array, grad: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """[N, D, H, W, I], [N, D, H, W, O] -> [3, 3, 3, I, O]."""
    shape = jax.ShapeDtypeStruct((3, 3, 3, x.shape[-1], grad.shape[-1]), x.dtype)
    transpose = jax.linear_transpose(lambda k: native(x, k, precision), shape)
    return transpose(grad)[0]
