"""The 3x3x3 convolution on TPU, which pads few channels to many."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.conv2d import conv2d
from unetr_flax.ops.conv3x3x3 import tpu_slabs, xla
from unetr_flax.ops.conv3x3x3.operands import (
    AnyOperands,
    Operands,
    backward_as_one,
    backward_with_arrays,
    mirrored,
)
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.reductions import channel_sums
from unetr_flax.ops.tpu_slices import axis_of_slices, kernel_turned, turned

# These limits minimize the memory traffic that the TPU's compiler reports, then its compile time.

# Up to this many features of an input with more channels, the depth taps are summed. Otherwise they
# are concatenated to the channels, which always beats XLA's own 3D convolution.
FEW_FEATURES = 16

# Up to this many channels, concatenated depth taps are best for the kernel's gradient; with more
# channels XLA's own convolution is.
FILLED_LANES = 48

# The kernel's gradient takes ten times as long to compile if the taps go to a side with so few
# channels.
FEW_CHANNELS = 3


def forward(
    operands: AnyOperands, *, precision: lax.PrecisionLike, differentiated: bool
) -> jax.Array:
    """Computes [N, D, H, W, O]."""
    if size := tpu_slabs.slab_size(operands):
        return tpu_slabs.forward(operands, size, precision=precision)
    x, _, kernel, bias = operands.with_arrays().as_one()
    axis = axis_of_slices(x)
    y = turned(_conv(turned(x, axis), kernel_turned(kernel, axis), precision), axis)
    return y if bias is None else y + bias


def backward(
    operands: AnyOperands, grad: jax.Array, *, precision: lax.PrecisionLike
) -> AnyOperands:
    """Computes the gradients of the operands."""
    if size := tpu_slabs.slab_size(operands):
        return tpu_slabs.backward(operands, grad, size, precision=precision)

    def gradients(operands, grad):
        x, _, kernel, bias = operands
        axis = axis_of_slices(x)
        x, slices = turned(x, axis), turned(grad, axis)
        return Operands(
            turned(_conv(slices, mirrored(kernel_turned(kernel, axis)), precision), axis),
            None,
            kernel_turned(_kernel_grad(x, slices, precision), axis),
            None if bias is None else channel_sums(grad).astype(bias.dtype),
        )

    one = functools.partial(backward_as_one, gradients)
    return backward_with_arrays(one, operands, grad)


def _conv(x, kernel, precision):
    """Convolves slices in 2D, with the depth taps among the channels or summed afterwards."""
    n, depth, h, w, inputs = x.shape
    features = kernel.shape[-1]
    if not features <= FEW_FEATURES < inputs:
        kernel = jnp.moveaxis(kernel, 0, -3).reshape(3, 3, 3 * inputs, features)
        taps = _depth_taps(x).reshape(n * depth, h, w, 3 * inputs)
        y = conv2d(taps, kernel, "SAME", precision, None)
        return y.reshape(n, depth, h, w, features)
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    slices = (padded[:, tap : tap + depth].reshape(n * depth, h, w, inputs) for tap in range(3))
    wide = at_least_float32(x.dtype)
    y: Any = sum(conv2d(z, kernel[tap], "SAME", precision, wide) for tap, z in enumerate(slices))
    return y.reshape(n, depth, h, w, features).astype(x.dtype)


def _kernel_grad(x, grad, precision):
    """Computes the kernel's gradient, with depth taps on the narrower side unless too narrow."""
    n, depth, h, w, inputs = x.shape
    features = grad.shape[-1]
    narrow = min(inputs, features)
    if 3 * narrow > FILLED_LANES:
        return xla.kernel_grad(x, grad, precision)
    taps_on_input = inputs >= features if narrow <= FEW_CHANNELS else inputs <= features
    if not taps_on_input:
        mirrored = _kernel_grad(grad, x, precision)
        return jnp.flip(mirrored, (0, 1, 2)).swapaxes(-1, -2)
    taps = _depth_taps(x).reshape(n * depth, h, w, 3 * inputs)
    shape = jax.ShapeDtypeStruct((3, 3, 3 * inputs, features), x.dtype)
    transpose = jax.linear_transpose(lambda k: conv2d(taps, k, "SAME", precision, None), shape)
    kernel = transpose(grad.reshape(n * depth, h, w, features))[0]
    return jnp.moveaxis(kernel.reshape(3, 3, 3, inputs, features), 2, 0)


def _depth_taps(x: jax.Array) -> jax.Array:
    """Gives slices their two neighbors' channels: [N, D, H, W, I] -> [N, D, H, W, 3 I]."""
    depth = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([x[:, tap : tap + depth] for tap in range(3)], axis=-1)
