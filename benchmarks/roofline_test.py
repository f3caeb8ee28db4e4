import jax
import jax.numpy as jnp

from benchmarks.roofline import cost_of, measure


def test_cost_counts_a_product_as_written():
    x, y = jnp.ones((8, 32)), jnp.ones((32, 16))

    def by_platform(x, y):
        # The CPU's branch has more operations, which must not be counted.
        return jax.lax.platform_dependent(
            x, y, cpu=lambda x, y: (x @ y) @ (y.T @ y), default=jnp.matmul
        )

    function = jax.jit(by_platform)
    cost = cost_of(function, function.lower(x, y).compile(), x, y)
    assert cost.flops == 2 * 8 * 32 * 16
    assert cost.traffic >= 4 * (8 * 32 + 32 * 16 + 8 * 16)
    assert cost.needed >= 4 * (8 * 32 + 32 * 16 + 8 * 16)


def test_limits_are_measured():
    peaks = measure("float32", edge=128, megabytes=4)
    assert 1e7 < peaks.flops < 1e16
    assert 1e7 < peaks.bandwidth < 1e14
