"""The gradient of a 3D convolution's kernel on CPU, as 2D convolutions.

The gradient is itself a convolution: its input is the input, whose channels take the place of the
batch, and its kernel, as large as the volume, is the gradient of the result. Its blocks of rows are
2D convolutions, which XLA:CPU computes at the processor's speed: they slide along depth and height,
and the voxels of a row are the channels to sum over. Shifts along a row are copies of the input's
block.

Shapes: N batch; D, H, W positions of the kernel; K its size; I input channels, O results.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.conv2d import conv2d
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.materialize import materialize, witness_of

# Approximate number of rows of a block along depth and height, so that a block fits a core's cache.
BLOCK = 8
# In float64 every row costs a copy, see `conv2d`.
FLOAT64_BLOCK = 2

# Maximum number of parallel sums, each of which takes the memory of a kernel's gradient.
MAX_LANES = 8


def kernel_grad(
    x: jax.Array,
    grad: jax.Array,
    pad: Callable[[jax.Array], jax.Array],
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Computes the gradient of a kernel, [K, K, K, I, O].

    Args:
      x: the input; should have fewer channels than the gradient, since it is copied.
      grad: gradient of the result, [N, D, H, W, O].
      pad: function from x to all that the kernel sees, [N, D + K - 1, H + K - 1, W + K - 1, I].
      precision: precision of the products.
    """

    n, depth, h, w, features = grad.shape
    *_, inputs = padded = jax.eval_shape(pad, x).shape
    size, rest = padded[1] - depth + 1, padded[2] * padded[3]

    def channels_first(x):
        # Height and width share one axis, so that rows are contiguous in memory.
        return pad(x).transpose(0, 1, 4, 2, 3).reshape(n, padded[1], inputs, rest)

    # With the gradient as the witness, XLA cannot make this copy in the forward pass and store it.
    x = materialize(channels_first, witness_of(grad), x).reshape(n, padded[1], inputs, *padded[2:4])
    block = FLOAT64_BLOCK if x.dtype == jnp.float64 else BLOCK
    rows, columns = _divisor(depth, block), _divisor(h, block)
    wide = at_least_float32(x.dtype)

    # Samples are further channels to sum over. Where devices may share the batch, samples stay
    # apart instead, so that the devices exchange nothing but the sum.
    apart = n if _several_devices() else 1
    convolve = jax.vmap(
        functools.partial(conv2d, padding="VALID", precision=precision, result=wide)
    )

    along = jnp.asarray(h // columns)

    @jax.jit
    def of_block(block):
        start, left = lax.div(block, along) * rows, lax.rem(block, along) * columns
        seen = (n, rows + size - 1, inputs, columns + size - 1, w + size - 1)
        seen = lax.dynamic_slice(x, (0, start, 0, left, 0), seen)
        seen = seen.reshape(apart, -1, *seen.shape[1:]).transpose(0, 3, 2, 4, 1, 5)
        seen = jnp.stack([seen[..., shift : shift + w] for shift in range(size)], axis=1)
        seen = seen.reshape(apart, size * inputs, *seen.shape[3:5], -1)
        kernel = lax.dynamic_slice(grad, (0, start, left, 0, 0), (n, rows, columns, w, features))
        kernel = kernel.reshape(apart, -1, *kernel.shape[1:]).transpose(0, 2, 3, 1, 4, 5)
        kernel = kernel.reshape(apart, rows, columns, -1, features)
        return convolve(seen, kernel)

    # Each lane is a separate sum that keeps a core busy; XLA:CPU compiles equal code once.
    count = depth // rows * (h // columns)
    lanes = min(_cores(), MAX_LANES, count)
    share = count // lanes

    def add_each(_, sums):
        return tuple((block + 1, total + of_block(block)) for block, total in sums)

    zeros = jnp.zeros((apart, size * inputs, size, size, features), wide)
    firsts = [jnp.asarray(lane * share) for lane in range(lanes)]
    sums = lax.fori_loop(0, share, add_each, tuple((first, zeros) for first in firsts))
    total: Any = sum(total for _, total in sums)
    for block in range(lanes * share, count):
        total += of_block(jnp.asarray(block))
    total = total.sum(0).reshape(size, inputs, size, size, features).astype(x.dtype)
    return total.transpose(2, 3, 0, 1, 4)


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Not every operating system has affinities.
        return os.cpu_count() or 1


def _several_devices() -> bool:
    try:
        return len(jax.devices("cpu")) > 1
    except RuntimeError:  # A process without CPU devices runs no programs on them.
        return False


def _divisor(count: int, near: int) -> int:
    divisors = [k for k in range(1, count + 1) if count % k == 0]
    return min(divisors, key=lambda k: max(k / near, near / k))
