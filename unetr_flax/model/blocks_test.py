import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.model.blocks import BatchNorm, Conv3DBlock, Deconv3DBlock, GroupNorm


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


@pytest.mark.parametrize("spatial", [(6,), (4, 6), (2, 4, 6)])
def test_blocks_take_any_number_of_axes(spatial):
    x = jnp.ones((2, *spatial, 3))
    y, _ = Conv3DBlock(5).init_with_output(jax.random.key(0), x)
    assert y.shape == (2, *spatial, 5)
    strides = (1, 2, 2)[: len(spatial)]
    y, variables = Deconv3DBlock(5, strides).init_with_output(jax.random.key(0), x)
    assert y.shape == (2, *(n * s for n, s in zip(spatial, strides, strict=True)), 5)
    assert variables["params"]["deconv"]["kernel"].shape == (*strides, 3, 5)


@pytest.mark.parametrize("norm", [GroupNorm(), GroupNorm(1), BatchNorm()])
def test_norms_keep_float32_s_digits_over_large_volumes(norm):
    # All of one sign, so that what a long sum of squares loses does not cancel.
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


def test_a_deferred_norm_is_the_same_norm():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 4, 3))) * 2 + 1
        plain = Conv3DBlock(6, param_dtype=jnp.float64)
        deferring = Conv3DBlock(6, param_dtype=jnp.float64, remat=True)
        variables = plain.init(jax.random.key(1), x)

        def run(block, params, x):
            given = {**variables, "params": params}
            y, updated = block.apply(given, x, train=True, mutable=["batch_stats"])
            assert isinstance(y, ops.DeferredNorm) == (block is deferring)
            return ops.joined(y), updated

        def everything(block):
            y, vjp, updated = jax.vjp(
                lambda *given: run(block, *given), variables["params"], x, has_aux=True
            )
            return y, updated, vjp(jnp.sin(3 * y))

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
            everything(plain),
            everything(deferring),
        )
        # In evaluation there is nothing to keep.
        np.testing.assert_array_equal(deferring.apply(variables, x), plain.apply(variables, x))
