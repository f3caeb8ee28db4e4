import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax.blocks import BatchNorm, Conv3DBlock, Deconv3DBlock


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
