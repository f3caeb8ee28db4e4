"""A 3x3x3 convolution of an up-sampled volume, computed on the coarse grid.

A deconvolution of kernel and stride 2 makes 2x2x2 fine voxels of a coarse one, and a 3x3x3
convolution sees two coarse voxels along an axis. Both together are a convolution of 2x2x2 coarse
voxels with eight results, one for each fine voxel in their middle (Shi et al. 2016, section 3.2,
and "Is the deconvolution layer the same as a convolutional layer?"). That needs about half of the
operations, and no up-sampled volume in memory.

Shapes: N batch; D, H, W coarse grid; I channels there, M after the deconvolution, O results.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unetr_flax.ops.conv2d import conv2d
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.materialize import materialize
from unetr_flax.ops.patches import depth_to_space, space_to_depth


def _seen() -> np.ndarray:
    """Marks with 1 the fine voxels that each tap of a 3x3x3 kernel sees.

    The axes are [coarse voxel, fine result, fine voxel, tap], each of which stands for three axes.
    """
    coarse, result, fine, tap = np.indices((2, 2, 2, 3))
    one = 2 * coarse + fine == result + tap
    return np.einsum("quaj,rvbk,swcl->qrsuvwabcjkl", one, one, one)


_SEEN = _seen()


def pays(x: jax.Array, up_kernel: jax.Array, kernel: jax.Array) -> bool:
    """Tells whether this takes fewer multiplications than deconvolution and convolution in turn.

    The count is for one volume, since the batch size may be symbolic.
    """
    *strides, inputs, middle = up_kernel.shape
    features = kernel.shape[-1]
    coarse = math.prod(x.shape[1:-1])
    apart = 8 * coarse * (27 * middle * features + inputs * middle)
    together = 64 * coarse * inputs * features + 512 * inputs * middle * features
    return strides == [2, 2, 2] and together < apart


def compose(up_kernel: jax.Array, up_bias: jax.Array | None, kernel: jax.Array) -> jax.Array:
    """Composes both kernels: [2, 2, 2, I, M], [M], [3, 3, 3, M, O] -> [2, 2, 2, I, 2, 2, 2, O].

    A bias becomes the kernel of one more input channel, which is 1 inside the volume: outside, the
    convolution sees zeros, not the bias.
    """
    if up_bias is not None:
        row = jnp.broadcast_to(up_bias, (*up_kernel.shape[:3], 1, up_bias.size))
        up_kernel = jnp.concatenate([up_kernel, row], axis=-2)
    types = {"precision": "highest", "preferred_element_type": at_least_float32(kernel.dtype)}
    # A product with ones and zeros compiles faster than nested paddings.
    kernel = jnp.einsum(
        "qrsuvwabcjkl,jklmo->qrsuvwabcmo", _SEEN.astype(kernel.dtype), kernel, **types
    )
    composed = jnp.einsum("qrsuvwabcmo,abcim->qrsiuvwo", kernel, up_kernel, **types)
    # Without the barrier jax 0.11.2 compiles permutations of float64 kernels for minutes.
    return lax.optimization_barrier(composed.astype(up_kernel.dtype))


def windows(x: jax.Array, with_one: bool) -> jax.Array:
    """Pads [N, D, H, W, I] to [N, D + 2, H + 2, W + 2, I], optionally with a channel of ones."""
    if with_one:
        x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))


def forward(
    x: jax.Array, with_one: bool, composed: jax.Array, precision: lax.PrecisionLike
) -> jax.Array:
    """Computes [N, D, H, W, I] -> [N, D + 1, H + 1, W + 1, 8 O], in float32 or wider."""
    n, d, h, w, inputs = x.shape
    seen = 2 * (inputs + with_one)

    def pairs(x):
        """Concatenates the channels of each two neighboring slices."""
        x = windows(x, with_one)
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=-1)

    taps = materialize(pairs, composed, x).reshape(n * (d + 1), h + 2, w + 2, seen)
    kernel = jnp.moveaxis(composed, 0, 2).reshape(2, 2, seen, -1)
    z = conv2d(taps, kernel, "VALID", precision, at_least_float32(x.dtype))
    return z.reshape(n, d + 1, h + 1, w + 1, kernel.shape[-1])


def to_fine(z: jax.Array) -> jax.Array:
    """Spreads eight results per window: [N, D + 1, H + 1, W + 1, 8 O] -> [N, 2 D, 2 H, 2 W, O]."""
    return depth_to_space(z, (2, 2, 2), z.shape[-1] // 8)[:, 1:-1, 1:-1, 1:-1]


def to_coarse(grad: jax.Array, witness: jax.Array) -> jax.Array:
    """Computes the transpose of `to_fine`."""

    def call(grad):
        return space_to_depth(jnp.pad(grad, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0))), (2, 2, 2))

    return materialize(call, witness, grad)


def x_grad(z_grad: jax.Array, composed: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """Computes the gradient of x from that of `forward`'s result.

    Args:
      z_grad: [N, D + 1, H + 1, W + 1, 8 O].
      composed: [2, 2, 2, I, 2, 2, 2, O], without the channel of ones.
      precision: precision of the products.

    Returns:
      [N, D, H, W, I].
    """
    n, d, h, w, features = z_grad.shape
    inputs = composed.shape[3]
    # Each slice of windows contributes to the slices on both sides.
    kernel = jnp.flip(composed, (0, 1, 2)).reshape(2, 2, 2, inputs, features)
    kernel = kernel.transpose(1, 2, 4, 0, 3).reshape(2, 2, features, 2 * inputs)
    wide = at_least_float32(z_grad.dtype)
    y = conv2d(z_grad.reshape(n * d, h, w, features), kernel, "VALID", precision, wide)
    y = y.reshape(n, d, h - 1, w - 1, 2, inputs)

    def add_up(y):
        return (y[:, :-1, ..., 0, :] + y[:, 1:, ..., 1, :]).astype(z_grad.dtype)

    return materialize(add_up, composed, y)
