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
    """Convolves [N, H, W, I] with [K, L, I, O] at stride 1.

    Args:
      x: slices, [N, H, W, I].
      kernel: [K, L, I, O]; K and L are odd if padding is "SAME".
      padding: "SAME" or "VALID".
      precision: precision of the products.
      result: dtype of the sums and of the result; x's if None.

    Returns:
      [N, H, W, O], or with "VALID" [N, H - K + 1, W - L + 1, O].
    """
    types = {"precision": precision, "preferred_element_type": result}
    if x.dtype == jnp.float64:
        # XLA:CPU's float64 convolution is slow, but its float64 matrix product is fast.
        rows, columns, _, features = kernel.shape
        if padding == "SAME":
            x = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
        h, w = x.shape[1] - rows + 1, x.shape[2] - columns + 1
        windows = [x[:, i : i + h, j : j + w] for i in range(rows) for j in range(columns)]
        return jnp.matmul(jnp.concatenate(windows, -1), kernel.reshape(-1, features), **types)
    spatial = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=spatial, **types)
