"""Linear maps with the parameters and results of `nn.DenseGeneral`."""

import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax

from unetr_flax.ops.dtypes import add_bias
from unetr_flax.ops.linear import linear
from unetr_flax.ops.platform import Lowering


class Dense(nn.DenseGeneral):
    """`nn.DenseGeneral` over the last axes, which adds the bias before it rounds to 16 bits.

    Fields, parameters and result are those of `nn.DenseGeneral`.

    Attributes:
      lowering: "auto", or "xla" for XLA's own product.

    Raises:
      ValueError: if other axes than the last ones are to be summed over, or there are batch axes or
        another product.
    """

    lowering: Lowering = "auto"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes [*batch, *I] -> [*batch, *features]."""
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        axis = (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)
        count = len(axis)
        if (
            axis != tuple(range(-count, 0))
            or self.batch_dims
            or self.dot_general is not None
            or self.dot_general_cls is not None
        ):
            raise ValueError(
                f"axis={self.axis}: must be the last axes, without batch_dims and dot_general"
            )
        sizes = inputs.shape[-count:]
        inner, outer = math.prod(sizes), math.prod(features)

        def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return self.kernel_init(key, (inner, outer), dtype).reshape(shape)

        def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return self.bias_init(key, (outer,), dtype).reshape(shape)

        kernel = self.param("kernel", kernel_init, (*sizes, *features), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", bias_init, features, self.param_dtype)
        operands: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        x, kernel, bias = operands
        batch = x.shape[:-count]
        if self.lowering == "xla":
            ours, kernels = range(x.ndim - count, x.ndim), range(count)
            y = lax.dot_general(x, kernel, ((ours, kernels), ((), ())), self.precision)
            return add_bias(y.reshape(*batch, outer), _flat(bias)).reshape(*batch, *features)
        x = x.reshape(*batch, inner)
        y = linear(x, kernel.reshape(inner, outer), _flat(bias), self.precision, x.dtype)
        return y.reshape(*batch, *features)


def _flat(bias: jax.Array | None) -> jax.Array | None:
    return None if bias is None else bias.reshape(-1)
