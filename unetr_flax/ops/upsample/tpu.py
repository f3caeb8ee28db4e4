"""Up-sampling on TPU, where permuting few channels moves many times their size."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops.tpu_slices import axis_of_slices, kernel_turned, turned

# Up to this many of a TPU's 128 lanes, a convolution moves less memory than a permutation by the
# figures of the TPU's compiler.
FILLED_LANES = 64


def pays(kernel: jax.Array) -> bool:
    """Tells whether this beats a matrix product and a permutation."""
    return kernel.ndim == 5 and kernel.shape[-1] <= FILLED_LANES


def upsample(
    x: jax.Array, kernel: jax.Array, *, precision: lax.PrecisionLike, result: DTypeLike | None
) -> jax.Array:
    """Computes [N, *S, I], [*P, I, O] -> [N, *(S * P), O], for three axes.

    This is a convolution of slices that are dilated by zeros. The fine slices of one coarse slice
    are channels of the convolution's result, since permuting slices moves whole rows.
    """
    axis = axis_of_slices(x)
    x, kernel = turned(x, axis), kernel_turned(kernel, axis)
    slices, *patch, inputs, features = kernel.shape
    n, depth, h, w, _ = x.shape
    taps = jnp.moveaxis(jnp.flip(kernel, (1, 2)), 0, -2).reshape(*patch, inputs, -1)
    y = lax.conv_general_dilated(
        x.reshape(n * depth, h, w, inputs),
        taps,
        window_strides=(1, 1),
        padding=[(size - 1, size - 1) for size in patch],
        lhs_dilation=patch,
        dimension_numbers=lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),
        precision=precision,
        preferred_element_type=result,
    )
    y = y.reshape(n, depth, *y.shape[1:3], slices, features)
    y = jnp.moveaxis(y, 4, 2).reshape(n, depth * slices, *y.shape[2:4], features)
    return turned(y, axis)


def gradients(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, *, precision: lax.PrecisionLike
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of x and the kernel."""
    forward = functools.partial(upsample, precision=precision, result=None)
    return jax.vjp(forward, x, kernel)[1](grad)
