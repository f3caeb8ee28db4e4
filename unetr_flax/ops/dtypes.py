"""Number types."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """Returns the dtype for sums over many numbers of a dtype; a narrower one would lose digits."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32
