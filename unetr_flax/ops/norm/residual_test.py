import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.ops.norm import residual
from unetr_flax.ops.testing import random

SHAPE = (2, 3, 4, 5, 3)
EPSILON = 1e-3


def normalize(x, scale, bias, per_sample, **options):
    options = {"epsilon": EPSILON, "per_sample": per_sample, **options}
    return ops.normalize(x, scale, bias, **options)[0]


def by_definition(x, scale, bias, per_sample):
    axes = (1, 2, 3) if per_sample else (0, 1, 2, 3)
    centered = x - x.mean(axes, keepdims=True)
    return (
        centered / jnp.sqrt(jnp.square(centered).mean(axes, keepdims=True) + EPSILON) * scale + bias
    )


@pytest.mark.parametrize("lowering", ["auto", "xla"])
@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_a_sum_of_norms_and_arrays_has_the_gradients_of_its_definition(
    norms, per_sample, slope, lowering
):
    with jax.enable_x64(True):
        given = [(random(i, SHAPE), random(i + 2, (3,)), random(i + 4, (3,))) for i in range(2)]

        def arrays(norm_of, given):
            return [
                norm_of(*part, per_sample) if norm else part[0]
                for part, norm in zip(given, norms, strict=True)
            ]

        def ours(*given):
            own = functools.partial(normalize, lowering=lowering)
            return ops.add_leaky_relu(*arrays(own, given), slope, lowering=lowering)

        def expected(*given):
            total = sum(arrays(by_definition, given))
            return jnp.where(total > 0, total, slope * total)

        found, vjp = jax.vjp(jax.jit(ours), *given)
        truth, true_vjp = jax.vjp(expected, *given)
        grad = random(9, SHAPE)
        pairs = zip(
            jax.tree.leaves((found, vjp(grad))),
            jax.tree.leaves((truth, true_vjp(grad))),
            strict=True,
        )
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("remembered", [True, False])
def test_derivative_at_zero_is_the_slope_as_in_pytorch(remembered):
    ones = jnp.ones(3)
    y = normalize(jnp.ones(SHAPE), ones, 0 * ones, True) if remembered else jnp.zeros(SHAPE)
    found = jax.grad(lambda x: ops.add_leaky_relu(x, y, 0.25).sum())(jnp.zeros(SHAPE))
    np.testing.assert_array_equal(found, jnp.full(SHAPE, 0.25))


def test_it_is_in_the_dtype_of_its_parts_and_rounded_once():
    x, y = (random(i, SHAPE).astype(jnp.bfloat16) for i in range(2))
    ones = jnp.ones(3)
    found = ops.add_leaky_relu(normalize(x, ones, 0 * ones, True), y, 0.01)
    assert found.dtype == jnp.bfloat16
    total = by_definition(x.astype(jnp.float32), ones, 0 * ones, True) + y.astype(jnp.float32)
    expected = jnp.where(total > 0, total, 0.01 * total)
    # The tolerance is half a unit in the last place of bfloat16's eight digits.
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8 * 1.01)


def test_a_shortcut_that_is_wider_than_the_norm_has_a_gradient_of_its_own_dtype():
    x, grad = (random(i, SHAPE).astype(jnp.bfloat16) for i in (0, 9))
    shortcut = random(1, SHAPE).astype(jnp.float32)
    ones = jnp.ones(3)

    def total(x, shortcut):
        return ops.add_leaky_relu(normalize(x, ones, 0 * ones, True), shortcut, 0.25)

    found, vjp = jax.vjp(total, x, shortcut)
    grads = vjp(grad)
    assert [each.dtype for each in (found, *grads)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    np.testing.assert_array_equal(grads[1], jnp.where(found > 0, grad, grad * 0.25))


def test_norms_join_the_pass_over_memory_only_where_they_are_remembered(monkeypatch):
    fused = []
    own = residual._add
    monkeypatch.setattr(residual, "_add", lambda *given: fused.append(1) or own(*given))
    x, ones = random(0, SHAPE, jnp.float32), jnp.ones(3)
    y = normalize(x, ones, ones, True)
    expected = ops.add_leaky_relu(y, x, 0.01)
    assert len(fused) == 1
    for found in (
        ops.add_leaky_relu(y, x, 0.01, lowering="xla"),
        ops.add_leaky_relu(jax.jit(lambda y: y)(y), x, 0.01),
        ops.add_leaky_relu(normalize(x, ones, ones, True, lowering="xla"), x, 0.01),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert len(fused) == 1
