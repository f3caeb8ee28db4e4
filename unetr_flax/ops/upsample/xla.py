"""The plain definition of up-sampling: XLA's own transposed convolution."""

import jax
from jax import lax
from jax.typing import DTypeLike


def upsample(
    x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike, result: DTypeLike | None
) -> jax.Array:
    """Computes [N, *S, I], [*P, I, O] -> [N, *(S * P), O], for a kernel that equals its stride.

    The kernel is that of `nn.ConvTranspose`, which appears mirrored in the result.
    """
    *strides, _, _ = kernel.shape
    last, axes = x.ndim - 1, tuple(range(1, x.ndim - 1))
    return lax.conv_transpose(
        x,
        kernel,
        strides,
        "VALID",
        dimension_numbers=lax.ConvDimensionNumbers(
            (0, last, *axes), (last, last - 1, *range(last - 1)), (0, last, *axes)
        ),
        precision=precision,
        preferred_element_type=result,
    )
