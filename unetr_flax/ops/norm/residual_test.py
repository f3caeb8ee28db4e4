import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax.ops.features import deferred_norm
from unetr_flax.ops.norm.residual import residual

SHAPE = (2, 3, 4, 5, 3)
EPSILON = 1e-3


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def by_definition(x, scale, bias, per_sample):
    axes = (1, 2, 3) if per_sample else (0, 1, 2, 3)
    centered = x - x.mean(axes, keepdims=True)
    return (
        centered / jnp.sqrt(jnp.square(centered).mean(axes, keepdims=True) + EPSILON) * scale + bias
    )


@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_a_sum_of_norms_and_arrays_has_the_gradients_of_its_definition(norms, per_sample, slope):
    with jax.enable_x64(True):
        given = [(random(i, *SHAPE), random(i + 2, 3), random(i + 4, 3)) for i in range(2)]

        def ours(*given):
            return residual(
                tuple(
                    deferred_norm(*part, EPSILON, per_sample, 1.0, part[0].dtype)
                    if norm
                    else part[0]
                    for part, norm in zip(given, norms, strict=True)
                ),
                slope,
            )

        def expected(*given):
            total = sum(
                by_definition(*part, per_sample) if norm else part[0]
                for part, norm in zip(given, norms, strict=True)
            )
            return jnp.where(total > 0, total, slope * total)

        found, vjp = jax.vjp(jax.jit(ours), *given)
        truth, true_vjp = jax.vjp(expected, *given)
        grad = random(9, *SHAPE)
        pairs = zip(
            jax.tree.leaves((found, vjp(grad))),
            jax.tree.leaves((truth, true_vjp(grad))),
            strict=True,
        )
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_it_is_in_the_dtype_of_its_parts_and_rounded_once():
    x, y = (random(i, *SHAPE).astype(jnp.bfloat16) for i in range(2))
    ones = jnp.ones(3)
    norm = deferred_norm(x, ones, 0 * ones, EPSILON, True, 1.0, x.dtype)
    found = residual((norm, y), 0.01)
    assert found.dtype == jnp.bfloat16
    total = by_definition(x.astype(jnp.float32), ones, 0 * ones, True) + y.astype(jnp.float32)
    expected = jnp.where(total > 0, total, 0.01 * total)
    # Half of a unit in the last of eight places.
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8 * 1.01)
