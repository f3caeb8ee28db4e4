"""The gradient of a 3D convolution's kernel on CPU, as 2D convolutions.

The gradient is a convolution itself: of the input, whose channels take the place of the batch, with
the result's gradient as a kernel as large as the volume. Blocks of rows of it are 2D convolutions
that XLA:CPU computes at the pace of the processor: depth and height are what they slide along, the
voxels of a row are the channels to sum over. Shifts along a row are copies, of the input's block.

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

# Rows of a block along depth and along height, about: its operands fit a core's cache.
BLOCK = 8
# In float64 every row costs a copy, see `conv2d`.
FLOAT64_BLOCK = 2

# Sums side by side at most, each of which takes the memory of a kernel's gradient.
MAX_LANES = 8


def kernel_grad(
    x: jax.Array,
    grad: jax.Array,
    pad: Callable[[jax.Array], jax.Array],
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Computes the gradient of a kernel, [K, K, K, I, O].

    Args:
      x: the input; best of fewer channels than the gradient, as it is copied.
      grad: gradient of the result, [N, D, H, W, O].
      pad: function from x to everything the kernel sees, [N, D + K - 1, H + K - 1, W + K - 1, I].
      precision: precision of the products.
    """

    n, depth, h, w, features = grad.shape
    *_, inputs = padded = jax.eval_shape(pad, x).shape
    size, rest = padded[1] - depth + 1, padded[2] * padded[3]

    def channels_first(x):
        # In one axis, rows lie one after the other in memory.
        return pad(x).transpose(0, 1, 4, 2, 3).reshape(n, padded[1], inputs, rest)

    # The gradient as witness: without it XLA would do this in the forward pass, and keep both.
    x = materialize(channels_first, witness_of(grad), x).reshape(n, padded[1], inputs, *padded[2:4])
    block = FLOAT64_BLOCK if x.dtype == jnp.float64 else BLOCK
    rows, columns = _divisor(depth, block), _divisor(h, block)
    wide = at_least_float32(x.dtype)

    # Samples are more channels to sum over, or apart where devices may each have some of them:
    # those then exchange nothing but the sum.
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

    # Each lane is a sum for itself, which keeps a core busy; XLA:CPU compiles equal code once.
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
    except AttributeError:  # not on every operating system
        return os.cpu_count() or 1


def _several_devices() -> bool:
    try:
        return len(jax.devices("cpu")) > 1
    except RuntimeError:  # a process without CPU devices has no programs for them
        return False


def _divisor(count: int, near: int) -> int:
    divisors = [k for k in range(1, count + 1) if count % k == 0]
    return min(divisors, key=lambda k: max(k / near, near / k))
