"""2D convolutions of slices, for volumes on CPU and TPU."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    padding: str,
    precision: lax.PrecisionLike,
    result: DTypeLike | None,
) -> jax.Array:
    """Stride 1: [N, H, W, I], [K, L, I, O] -> [N, H, W, O], or [N, H - K + 1, W - L + 1, O].

    Args:
      x: slices.
      kernel: odd sizes if padded.
      padding: "SAME" or "VALID".
      precision: of the products.
      result: dtype of the sums and of the result.
    """
    types = {"precision": precision, "preferred_element_type": result}
    if x.dtype == jnp.float64:
        # XLA:CPU has no fast float64 convolution, but a fast float64 product.
        rows, columns, _, features = kernel.shape
        if padding == "SAME":
            x = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
        h, w = x.shape[1] - rows + 1, x.shape[2] - columns + 1
        windows = [x[:, i : i + h, j : j + w] for i in range(rows) for j in range(columns)]
        return jnp.matmul(jnp.concatenate(windows, -1), kernel.reshape(-1, features), **types)
    spatial = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=spatial, **types)
