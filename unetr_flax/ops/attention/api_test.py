import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops

SHAPE = (2, 6, 3, 8)
SCALE = 0.2


def heads(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, SHAPE, jnp.float32).astype(dtype) for key in keys]


def definition(query, key, value, mask=None):
    """Computes attention by its formula in float64, query by query."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(SHAPE)
    for b, n, h in np.ndindex(SHAPE[:3]):
        energy = key[b, :, h] @ query[b, n, h] * SCALE
        seen = np.ones(SHAPE[1], bool) if mask is None else mask[b, h, n]
        weights = np.where(seen, np.exp(energy), 0)
        out[b, n, h] = weights / weights.sum() @ value[b, :, h]
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_definition(dtype, tolerance, masked):
    query, key, value = heads(dtype)
    mask = np.random.default_rng(0).random((2, 3, 6, 6)) < 0.5 if masked else None
    if masked:
        mask |= np.eye(6, dtype=bool)  # Every token sees at least itself.
    out = ops.dot_product_attention(query, key, value, mask, scale=SCALE)
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float64), definition(query, key, value, mask), rtol=0, atol=tolerance
    )
    weights = ops.attention_weights(query, key, mask, scale=SCALE)
    assert weights.shape == (2, 3, 6, 6)
    assert np.array_equal(ops.weighted_values(weights, value), out)


def test_programs_are_exported_for_platforms_that_are_not_here():
    arguments = heads("bfloat16")
    attend = jax.jit(functools.partial(ops.dot_product_attention, scale=SCALE))
    exported = jax.export.export(attend, platforms=("cpu", "cuda", "tpu"))(*arguments)
    assert np.array_equal(exported.call(*arguments), attend(*arguments))
