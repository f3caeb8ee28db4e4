import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax.model.norms import BatchNorm, GroupNorm


def test_running_variance_is_unbiased_and_momentum_is_a_tenth():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4)) * 3 + 1
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x)
    y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    values = np.asarray(x, np.float64).reshape(-1, 4)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * values.var(0, ddof=1), rtol=1e-5)
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5)
    np.testing.assert_allclose(y.reshape(-1, 4), expected, rtol=1e-4, atol=1e-5)


def test_variance_survives_a_large_mean():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)) + 3000.0
    y, _ = BatchNorm().init_with_output(jax.random.key(0), x, train=True)
    assert 0.9 < np.std(y) < 1.1


def test_init_leaves_running_statistics_untouched():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    stats = BatchNorm().init(jax.random.key(0), x, train=True)["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], np.zeros(4))
    np.testing.assert_array_equal(stats["var"], np.ones(4))


def test_one_value_per_channel_has_no_variance():
    with pytest.raises(ValueError, match=r"more than one value per channel, got \(1, 1, 1, 4\)"):
        BatchNorm().init(jax.random.key(0), jnp.ones((1, 1, 1, 4)), train=True)


@pytest.mark.parametrize("norm", [GroupNorm(), GroupNorm(1), BatchNorm()])
def test_norms_keep_float32_s_digits_over_large_volumes(norm):
    # All numbers have one sign, so that the rounding errors of a long sum do not cancel.
    x = np.abs(np.random.default_rng(0).standard_normal((1, 96, 80, 64, 2))) ** 3 + 1
    axes = (1, 2, 3, 4) if norm == GroupNorm(1) else (1, 2, 3)
    expected = x - x.mean(axes, keepdims=True)
    expected /= np.sqrt(np.square(expected).mean(axes, keepdims=True) + 1e-5)
    x = x.astype(np.float32)
    if isinstance(norm, BatchNorm):
        y, _ = jax.jit(lambda x: norm.init_with_output(jax.random.key(0), x, train=True))(x)
    else:
        y, _ = jax.jit(lambda x: norm.init_with_output(jax.random.key(0), x))(x)
    assert np.abs(y - expected).max() / np.abs(expected).max() < 1e-6


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("norm", [GroupNorm(), GroupNorm(1), BatchNorm()])
def test_gradients_in_bfloat16_are_sums_in_float32(norm, param_dtype):
    norm = norm.clone(dtype=jnp.bfloat16, param_dtype=param_dtype)
    x = jnp.ones((1, 32, 32, 2), jnp.bfloat16)
    train = {"train": True} if isinstance(norm, BatchNorm) else {}
    variables = norm.init(jax.random.key(0), x)

    def total(variables):
        y, _ = norm.apply(variables, x, **train, mutable=["batch_stats"])
        return y.astype(jnp.float32).sum() * 1.0078125

    grads = jax.grad(total)(variables)["params"]
    assert grads["bias"].dtype == param_dtype
    np.testing.assert_array_equal(grads["bias"].astype(jnp.float32), 1032.0)


@pytest.mark.parametrize("norm", [GroupNorm, lambda **fields: GroupNorm(3, **fields), BatchNorm])
def test_plain_lowering_is_the_same_norm(norm):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 4, 6))) * 2 + 1
        options = {"param_dtype": jnp.float64, "negative_slope": 0.1}
        train = {"train": True} if norm is BatchNorm else {}

        def everything(lowering):
            module = norm(lowering=lowering, **options)
            variables = module.init(jax.random.key(0), x)
            params = jax.tree.map(lambda leaf: leaf + 0.5, variables["params"])

            def run(params, x):
                given = {**variables, "params": params}
                return module.apply(given, x, **train, mutable=["batch_stats"])

            y, vjp, updated = jax.vjp(run, params, x, has_aux=True)
            return y, updated, vjp(jnp.sin(3 * y))

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
            everything("auto"),
            everything("xla"),
        )
