"""Number types."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """Returns the dtype for sums over many numbers of a dtype; a narrower one would lose digits."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Adds a bias [C] to [..., C], if there is one, in float32 or wider.

    So the gradient of the bias, a sum over all voxels, is one of float32 or wider, too: XLA:CPU
    loses a third of it in bfloat16.
    """
    if bias is None:
        return y
    wide = at_least_float32(y.dtype)
    return (y.astype(wide) + bias.astype(wide)).astype(y.dtype)
