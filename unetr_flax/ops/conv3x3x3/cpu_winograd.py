"""The 3x3x3 convolution with two thirds of the multiplications.

Two neighboring results of a filter with three taps need four products instead of six: the minimal
filtering F(2, 3) (Winograd 1980; Lavin & Gray 2016, section 4.1), here along depth, with 2D
convolutions as products. Rounding errors in float32 are 1.3 times those of three 2D convolutions.

Shapes: N batch; D, H, W positions; I input channels, O results.
"""

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.conv2d import conv2d
from unetr_flax.ops.dtypes import at_least_float32

# Below this many channels, 2D convolutions are too slow for fewer of their products to pay.
CHANNELS = 32


def pays(x: jax.Array, kernel: jax.Array) -> bool:
    """Tells whether minimal filtering is possible, precise in the dtype, and faster."""
    # In 16 bits the sums of slices and taps would be rounded.
    wide = x.dtype == at_least_float32(x.dtype)
    return wide and x.shape[1] % 2 == 0 and min(kernel.shape[-2:]) >= CHANNELS


def products(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> tuple:
    """Computes the four products of all pairs of slices.

    Args:
      x: [N, D, H, W, I].
      kernel: [3, 3, 3, I, O].
      precision: precision of the products.

    Returns:
      Four arrays [N, D / 2, H, W, O], in float32 or wider.
    """
    n, depth, h, w, inputs = x.shape
    pairs = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    pairs = pairs.reshape(n, depth // 2 + 1, 2, h, w, inputs)
    # The four slices that two neighboring results see.
    a, b = pairs[:, :-1, 0], pairs[:, :-1, 1]
    c, d = pairs[:, 1:, 0], pairs[:, 1:, 1]
    first, second, third = kernel
    kernels = first, (first + second + third) / 2, (first - second + third) / 2, third
    return tuple(
        conv2d(
            slices.reshape(-1, h, w, inputs), taps, "SAME", precision, at_least_float32(x.dtype)
        ).reshape(n, depth // 2, h, w, taps.shape[-1])
        for slices, taps in zip((a - c, b + c, c - b, b - d), kernels, strict=True)
    )


def results(products: tuple) -> jax.Array:
    """Computes the convolution [N, D, H, W, O] from its four `products`."""
    a, b, c, d = products
    n, half, *rest = a.shape
    return jnp.stack([a + b + c, b - c - d], axis=2).reshape(n, 2 * half, *rest)
