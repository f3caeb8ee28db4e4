"""Number types."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The precision for sums over many numbers of a dtype: narrower ones would lose digits."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32
