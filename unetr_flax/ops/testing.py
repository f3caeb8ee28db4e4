"""Random arrays and comparisons for the tests of operations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def random(seed: int, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> jax.Array:
    """Makes normally distributed numbers, in the widest dtype that is enabled if none is given."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_close(a: jax.Array, b: jax.Array, tolerance: float = 1e-12) -> None:
    """Compares shape, dtype and numbers; the tolerance is relative to the largest number of b."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if b.size:
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def value_and_gradients(function: Callable[..., Any], *operands: Any) -> list[jax.Array]:
    """Computes a compiled function and the gradients of its operands for a random cotangent."""
    y, vjp = jax.vjp(jax.jit(function), *operands)
    return jax.tree.leaves((y, vjp(random(9, y.shape, y.dtype))))
