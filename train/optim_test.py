import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.optim import (
    clip_by_global_norm,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
)
from unetr_flax import UNETR, UNETRConfig


def test_schedule_rises_linearly_then_falls_to_zero():
    schedule = learning_rate_schedule(2.0, total_steps=100, warmup_fraction=0.1)
    rates = [float(schedule(jnp.int32(i))) for i in range(101)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    assert rates[9] == 2
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert 0 < rates[99] < 1e-3
    assert rates[100] == 0


def test_only_kernels_decay():
    cfg = UNETRConfig.reference(
        (16, 32, 16), 1, 2, light_r=32, hidden_size=16, num_layers=4, num_heads=2
    )
    params = jax.eval_shape(UNETR(cfg).init, jax.random.key(0), jnp.zeros((1, 16, 32, 16, 1)))
    flat, _ = jax.tree_util.tree_flatten_with_path(decay_mask(params["params"]))
    decays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    assert decays["encoder/embedding/projection/kernel"]
    assert decays["encoder/block_3/attention/qkv/kernel"]
    assert not decays["encoder/embedding/position_embedding"]
    assert not decays["encoder/block_0/attention/qkv/bias"]
    assert not decays["encoder/block_0/norm1/scale"]
    assert {path.rsplit("/")[-1] for path, decay in decays.items() if decay} == {"kernel"}


def test_decay_and_clipping_reach_the_update():
    params = {"kernel": jnp.full((2, 3), 10.0), "bias": jnp.full((3,), 10.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = make_optimizer(lambda count: 0.1, weight_decay=0.5, clip_norm=1.0)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 10, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)

    # Adam forgets the scale of gradients, so clipping shows in its moments.
    _, state = tx.update(jax.tree.map(lambda x: x + 7, zeros), tx.init(params), params)
    moments = optax.tree.get(state, "mu")
    assert optax.tree.norm(moments) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_optax_s(max_norm):
    grads = {"a": jnp.arange(12.0).reshape(3, 4), "b": -jnp.ones(5)}
    ours, theirs = (
        clip(max_norm).update(grads, optax.EmptyState())[0]
        for clip in (clip_by_global_norm, optax.clip_by_global_norm)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
