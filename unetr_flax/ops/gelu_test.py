import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.ops.testing import random, value_and_gradients


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("lowering", ["auto", "xla"])
def test_16_bits_are_rounded_once(dtype, lowering):
    x = 3 * random(0, (1000,), jnp.float32).astype(dtype)
    found = value_and_gradients(lambda x: ops.gelu(x, lowering=lowering), x)
    y, vjp = jax.vjp(lambda x: nn.gelu(x, approximate=False), x.astype(jnp.float32))
    exact = y, *vjp(random(9, y.shape, dtype).astype(jnp.float32))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        assert (np.asarray(a) != np.asarray(b.astype(dtype))).mean() < 0.01


def test_the_backward_pass_stores_the_input_alone():
    x = random(0, (4,), jnp.bfloat16)
    _, vjp = jax.vjp(ops.gelu, x)
    assert [leaf.dtype for leaf in jax.tree.leaves(vjp)] == [jnp.bfloat16]


def test_float32_is_that_of_flax():
    x = random(0, (50,), jnp.float32)
    np.testing.assert_array_equal(ops.gelu(x), nn.gelu(x, approximate=False))
