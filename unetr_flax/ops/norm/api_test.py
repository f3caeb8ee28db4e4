import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.ops.norm import xla
from unetr_flax.ops.testing import random

EPSILON = 1e-3


@pytest.mark.parametrize("slope", [1.0, 0.0, 0.25])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 37, 5, 3), (2, 40, 3), (5, 3)])
def test_normalization_and_its_gradients_are_those_of_its_definition(shape, per_sample, slope):
    def ours(*arguments):
        return ops.normalize(
            *arguments, epsilon=EPSILON, per_sample=per_sample, negative_slope=slope
        )

    def definition(*arguments):
        return xla.normalize(*arguments, EPSILON, per_sample, slope)

    with jax.enable_x64(True):
        arguments = random(0, shape), random(1, shape[-1:]), random(2, shape[-1:])
        found, vjp = jax.vjp(ours, *arguments)
        theirs, vjp_theirs = jax.vjp(definition, *arguments)
        cotangents = tuple(random(3 + i, y.shape) for i, y in enumerate(theirs))
        for a, b in zip(
            (*found, *vjp(cotangents)), (*theirs, *vjp_theirs(cotangents)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("slope", [1.0, 0.0, 0.25])
@pytest.mark.parametrize("per_sample", [False, True])
def test_plain_definition_is_the_norm_of_numpy_and_flax(per_sample, slope):
    with jax.enable_x64(True):
        x, scale, bias = random(0, (2, 4, 7, 3)), random(1, (3,)), random(2, (3,))
        y, mean, var = ops.normalize(
            *(x, scale, bias),
            epsilon=EPSILON,
            per_sample=per_sample,
            negative_slope=slope,
            lowering="xla",
        )
        axes = (1, 2) if per_sample else (0, 1, 2)
        np.testing.assert_allclose(mean, np.mean(x, axes).reshape(-1, 3), rtol=1e-12)
        np.testing.assert_allclose(var, np.var(x, axes).reshape(-1, 3), rtol=1e-12)
        given = {"params": {"scale": scale, "bias": bias}}
        if per_sample:
            norm = nn.GroupNorm(num_groups=None, group_size=1, epsilon=EPSILON)
        else:
            norm = nn.BatchNorm(use_running_average=False, epsilon=EPSILON)
            given["batch_stats"] = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
        expected, _ = norm.apply(given, x, mutable=["batch_stats"])
        expected = jnp.where(expected > 0, expected, slope * expected)
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lowering", ["auto", "xla"])
@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_derivative_of_the_activation_at_zero_is_the_slope_as_in_pytorch(slope, lowering):
    # The norm of a constant volume is 0, everywhere.
    x, ones = jnp.ones((1, 2, 3, 4)), jnp.ones(4)

    def total(bias):
        options = {"epsilon": EPSILON, "per_sample": True, "negative_slope": slope}
        return ops.normalize(x, ones, bias, lowering=lowering, **options)[0].sum()

    np.testing.assert_allclose(jax.grad(total)(0 * ones), slope * 6 * ones)


@pytest.mark.parametrize("lowering", ["auto", "xla"])
def test_result_has_the_dtype_asked_for_and_moments_are_wide(lowering):
    x, ones = random(0, (2, 4, 7, 3), jnp.bfloat16), jnp.ones(3)
    for dtype, expected in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
        y, mean, var = ops.normalize(
            *(x, ones, ones), epsilon=EPSILON, per_sample=True, dtype=dtype, lowering=lowering
        )
        assert y.dtype == expected
        assert mean.dtype == var.dtype == jnp.float32
        assert mean.shape == var.shape == (2, 3)
