import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.ops.testing import assert_close, random, value_and_gradients

# Features and axes of the model's kinds of linear maps, for an input [2, 5, 3, 4].
MAPS = [((2, 6), -1), (7, (-2, -1))]


def modules(features, axis, **fields):
    """Makes our module and Flax's with the same fields."""
    fields = {"axis": axis, "bias_init": nn.initializers.normal(), **fields}
    return ops.Dense(features, **fields), nn.DenseGeneral(features, **fields)


@pytest.mark.parametrize("lowering", ["auto", "xla"])
@pytest.mark.parametrize(("features", "axis"), MAPS)
@pytest.mark.parametrize("use_bias", [False, True])
def test_parameters_result_and_gradients_are_those_of_flax(features, axis, use_bias, lowering):
    with jax.enable_x64(True):
        x = random(0, (2, 5, 3, 4))
        ours, theirs = modules(features, axis, use_bias=use_bias, param_dtype=jnp.float64)
        variables = ours.init(jax.random.key(0), x)
        jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(0), x))
        found = value_and_gradients(ours.clone(lowering=lowering).apply, variables, x)
        expected = value_and_gradients(theirs.apply, variables, x)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_sum_with_the_bias_is_rounded_once(dtype):
    x = random(0, (2, 5, 4), dtype)
    ours, _ = modules(50, -1, dtype=dtype)
    variables = jax.tree.map(
        lambda a: a.astype(dtype).astype(jnp.float32), ours.init(jax.random.key(0), x)
    )
    kernel, bias = (np.asarray(variables["params"][k], np.float64) for k in ("kernel", "bias"))
    exact = np.asarray(x, np.float64) @ kernel + 8 * bias
    variables["params"]["bias"] *= 8
    found = jax.jit(ours.apply)(variables, x)
    # Sums of four products in float32 are all but exact.
    differ = np.asarray(found) != np.asarray(jnp.asarray(exact, jnp.float32).astype(dtype))
    assert differ.mean() < 0.01


def test_the_gradient_of_a_bias_in_bfloat16_is_summed_in_float32():
    module, _ = modules(2, -1, dtype=jnp.bfloat16)
    x = jnp.ones((1, 1024, 1), jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)

    def total(variables):
        return module.apply(variables, x).astype(jnp.float32).sum()

    # Added up one after the other in bfloat16, ones stop counting at 256.
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(variables)["params"]["bias"], 1024)


@pytest.mark.parametrize(
    "options", [{"axis": 1}, {"axis": (-1, -2)}, {"batch_dims": (0,)}, {"dot_general": print}]
)
def test_other_sums_are_refused(options):
    with pytest.raises(ValueError, match="must be the last axes"):
        ops.Dense(3, **options).init(jax.random.key(0), jnp.ones((2, 5, 4)))
