import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.ops import reductions


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_norm_of_a_tree_is_that_of_all_its_numbers(dtype):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        shapes = {"a": (37, 5), "b": (16, 3), "c": (7,), "d": (), "e": (0,)}
        # Some leaves share their size, among them leaves too large to be grouped by size.
        shapes |= {"f": (5, 37), "g": (48,), "h": (300, 80), "i": (300, 80)}
        tree = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
        norm = jax.jit(ops.global_norm)(tree)
        assert norm.dtype == (dtype if dtype == "float64" else "float32")
        numbers = np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in tree.values()])
        tolerance = 1e-14 if dtype == "float64" else 1e-6
        np.testing.assert_allclose(norm, np.linalg.norm(numbers), rtol=tolerance)


@pytest.mark.parametrize("shape", [(2, 64, 48, 40, 3), (1, 3000, 7, 2), (5, 3)])
def test_sums_over_a_volume_keep_float32_s_digits(shape):
    # All terms have one sign, so a sum one by one would lose digits with every term.
    x = np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)
    axes = tuple(range(1, x.ndim - 1))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(
        reductions.channel_sums(x), exact.sum(tuple(range(x.ndim - 1))), rtol=5e-7
    )
    mean, var = reductions.moments(x, True)
    np.testing.assert_allclose(mean, exact.mean(axes), rtol=5e-7)
    np.testing.assert_allclose(var, exact.var(axes), rtol=2e-6, atol=1e-12)
