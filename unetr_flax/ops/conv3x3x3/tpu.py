"""The 3x3x3 convolution on TPU, which pads few channels to many."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.conv2d import conv2d
from unetr_flax.ops.conv3x3x3 import tpu_slabs, xla
from unetr_flax.ops.conv3x3x3.operands import (
    Operands,
    backward_as_one,
    backward_with_arrays,
    mirrored,
)
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.reductions import channel_sums

# What is best here is by the traffic that the TPU's compiler counts, then by its own time.

# For so few features of more channels, a sum over the depth taps; else the taps join the channels,
# which beats XLA's own 3D convolution throughout.
FEW_FEATURES = 16

# A kernel's gradient of no more channels than this is best with taps; XLA's own is beyond.
FILLED_LANES = 48

# A kernel's gradient of so few channels takes its compiler ten times as long if they get the taps.
FEW_CHANNELS = 3


def forward(operands: Operands, *, precision: lax.PrecisionLike, differentiated: bool) -> jax.Array:
    """[N, D, H, W, O]."""
    if size := tpu_slabs.slab_size(operands):
        return tpu_slabs.forward(operands, size, precision=precision)
    x, _, kernel, bias = operands.with_arrays().as_one()
    y = _conv(x, kernel, precision)
    return y if bias is None else y + bias


def backward(operands: Operands, grad: jax.Array, *, precision: lax.PrecisionLike) -> Operands:
    """The gradients of the operands."""
    if size := tpu_slabs.slab_size(operands):
        return tpu_slabs.backward(operands, grad, size, precision=precision)

    def gradients(operands, grad):
        x, _, kernel, bias = operands
        return Operands(
            _conv(grad, mirrored(kernel), precision),
            None,
            _kernel_grad(x, grad, precision),
            None if bias is None else channel_sums(grad).astype(bias.dtype),
        )

    one = functools.partial(backward_as_one, gradients)
    return backward_with_arrays(one, operands, grad)


def _conv(x, kernel, precision):
    """The depth taps join the channels, or are added up."""
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
    y = sum(conv2d(z, kernel[tap], "SAME", precision, wide) for tap, z in enumerate(slices))
    return y.reshape(n, depth, h, w, features).astype(x.dtype)


def _kernel_grad(x, grad, precision):
    """Its kernel's gradient: the depth taps join the narrower side, if it is not too narrow."""
    n, depth, h, w, inputs = x.shape
    features = grad.shape[-1]
    narrow = min(inputs, features)
    if 3 * narrow > FILLED_LANES:
        return xla.kernel_grad(x, grad, precision)
    joined = inputs >= features if narrow <= FEW_CHANNELS else inputs <= features
    if not joined:
        mirrored = _kernel_grad(grad, x, precision)
        return jnp.flip(mirrored, (0, 1, 2)).swapaxes(-1, -2)
    taps = _depth_taps(x).reshape(n * depth, h, w, 3 * inputs)
    shape = jax.ShapeDtypeStruct((3, 3, 3 * inputs, features), x.dtype)
    transpose = jax.linear_transpose(lambda k: conv2d(taps, k, "SAME", precision, None), shape)
    kernel = transpose(grad.reshape(n * depth, h, w, features))[0]
    return jnp.moveaxis(kernel.reshape(3, 3, 3, inputs, features), 2, 0)


def _depth_taps(x: jax.Array) -> jax.Array:
    """Each slice with the channels of its two neighbors: [N, D, H, W, I] -> [N, D, H, W, 3 I]."""
    depth = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([x[:, tap : tap + depth] for tap in range(3)], axis=-1)
