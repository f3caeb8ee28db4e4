import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.ops.materialize import materialize
from unetr_flax.ops.testing import random


def test_materialized_results_are_computed_once_on_cpu():
    def uses(z):
        return z.T, jnp.sin(z), (z**2).sum(0)

    def again(x, y):
        return uses(x * 2 + y)

    def kept(x, y):
        return uses(materialize(lambda x, y: x * 2 + y, y, x, y))

    x, y = random(0, (64, 48), jnp.float32), random(1, (64, 48), jnp.float32)
    additions = [
        jax.jit(f).lower(x, y).compile().as_text().count("f32[64,48]{1,0} add(")
        for f in (again, kept)
    ]
    for a, b in zip(again(x, y), jax.jit(kept)(x, y), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert additions[1] == 1 < additions[0]


def test_without_any_number_nothing_is_materialized():
    empty = jnp.zeros((0, 3))
    assert materialize(lambda x: x + 1, empty, empty).shape == (0, 3)
    traced = jax.make_jaxpr(lambda x: materialize(lambda x: x + 1, x, x))(empty)
    assert [eqn.primitive.name for eqn in traced.eqns] == ["add"]


def additions_of_the_gradient(add):
    """Counts the additions in the gradients of 4, 8 and 16 residual blocks."""

    def objective(x, kernel, blocks):
        x = add(x, jnp.zeros_like(x))
        for _ in range(blocks):
            centered = x - x.mean(-1, keepdims=True)
            normed = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True))
            x = add(x, jnp.tanh(normed @ kernel) @ kernel.T)
        return x.sum()

    x, kernel = random(0, (64, 48), jnp.float32), random(1, (48, 48), jnp.float32)
    gradient = jax.jit(jax.grad(objective), static_argnums=2)
    return [
        gradient.lower(x, kernel, blocks).compile().as_text().count(" add(")
        for blocks in (4, 8, 16)
    ]


def test_the_work_of_a_gradient_grows_with_the_blocks_on_cpu():
    additions = additions_of_the_gradient(ops.add)
    # Additions double with the blocks; without materialization they would quadruple.
    assert additions[2] - additions[1] == 2 * (additions[1] - additions[0]) > 0


@pytest.mark.parametrize("lowering", ["auto", "xla"])
def test_sum_and_its_gradients_are_those_of_plus(lowering):
    x, y = random(0, (3, 4), jnp.float32), random(1, (3, 4), jnp.float32)
    found, vjp = jax.vjp(lambda x, y: ops.add(x, y, lowering=lowering), x, y)
    np.testing.assert_array_equal(found, x + y)
    for grad in vjp(x):
        np.testing.assert_array_equal(grad, x)
