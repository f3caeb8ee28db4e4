"""The exact GELU (Hendrycks & Gimpel 2016), rounded once."""

import flax.linen as nn
import jax

from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.platform import Lowering


def gelu(x: jax.Array, *, lowering: Lowering = "auto") -> jax.Array:
    """Computes x times the normal distribution function of x, in float32 or wider.

    Args:
      x: any shape.
      lowering: with "auto" the backward pass in 16 bits stores x alone, see `platform.Lowering`.

    Returns:
      The result, in x's dtype.
    """
    if x.dtype == at_least_float32(x.dtype):
        return nn.gelu(x, approximate=False)
    return _in_float32(x) if lowering == "xla" else _narrow(x)


def _in_float32(x: jax.Array) -> jax.Array:
    return nn.gelu(x.astype(at_least_float32(x.dtype)), approximate=False).astype(x.dtype)


# JAX would store numbers in float32 for the backward pass.
@custom_vjp
def _narrow(x: jax.Array) -> jax.Array:
    return _in_float32(x)


_narrow.defvjp(lambda x: (_narrow(x), x), lambda x, grad: jax.vjp(_in_float32, x)[1](grad))
