import types
from typing import Any

import flax.linen as nn
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.losses import cross_entropy_loss, dice_cross_entropy_loss
from train.stand_in import Small
from train.state import create_state
from train.step import make_train_step
from unetr_flax import UNETR, UNETRConfig
from unetr_flax.inference.predictor import make_predict


@pytest.fixture(scope="module")
def small():
    return Small(types.SimpleNamespace(img_size=(4, 6, 8), in_channels=2, out_channels=3))


@pytest.fixture(scope="module")
def batch():
    image = np.random.default_rng(0).normal(size=(2, 4, 6, 8, 2)).astype(np.float32)
    return {"image": image, "label": np.digitize(image[..., 0], [-0.5, 0.5]).astype(np.int32)}


def test_the_real_model_learns_and_compiles_once(compiled):
    cfg = UNETRConfig.reference(
        (16, 32, 16), 1, 3, light_r=32, hidden_size=16, num_layers=4, num_heads=2
    )
    model, tx = UNETR(cfg), optax.adam(1e-2)
    image = np.random.default_rng(0).normal(size=(2, 16, 32, 16, 1)).astype(np.float32)
    batch = {"image": image, "label": np.digitize(image[..., 0], [-0.5, 0.5]).astype(np.int32)}
    state = create_state(model, tx, seed=0)
    before = jax.device_get(state.replace(rng=None))
    train_step = make_train_step(model, tx, dice_cross_entropy_loss)

    losses = []
    for _ in range(10):
        state, metrics = train_step(state, batch)
        losses.append(metrics["loss"])
    assert losses[-1] < 0.9 * losses[0]
    assert sum("train_step" in name for name in compiled) == 1

    assert state.step == 10
    after = jax.device_get(state.replace(rng=None))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(a, b)


def test_old_state_is_donated(small, batch):
    tx = optax.adam(1e-2)
    state = create_state(small, tx, seed=0)
    new_state, _ = make_train_step(small, tx, dice_cross_entropy_loss)(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new_state))


def test_dropout_depends_on_step_and_seed_only(small, batch):
    tx = optax.sgd(1.0)
    train_step = make_train_step(small, tx, dice_cross_entropy_loss)

    def loss(step, key):
        state = create_state(small, tx, seed=0)
        state = state.replace(step=jnp.int32(step), rng=jax.random.key_data(jax.random.key(key)))
        return float(train_step(state, batch)[1]["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert loss(0, 0) != loss(1, 0)
    assert loss(0, 0) != loss(0, 1)


def test_gradient_norm_is_from_before_clipping(small, batch):
    norms = []
    for tx in (optax.sgd(1.0), optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))):
        state = create_state(small, tx, seed=0)
        before = jax.device_get(state.params)
        state, metrics = make_train_step(small, tx, dice_cross_entropy_loss)(state, batch)
        moved = optax.tree.norm(jax.tree.map(jnp.subtract, before, state.params))
        norms.append((float(metrics["grad_norm"]), float(moved)))
    (plain, step), (clipped, short_step) = norms
    assert plain == pytest.approx(step, rel=1e-4)
    assert clipped == plain
    assert short_step == pytest.approx(1e-3, rel=1e-3)


class Linear(nn.Module):
    """A linear map of each voxel, whose loss of a batch is the mean of those of its parts."""

    config: Any
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(self.config.out_channels)(x)


def test_parts_of_a_batch_accumulate_to_the_whole():
    config = types.SimpleNamespace(img_size=(2, 3, 4), in_channels=2, out_channels=3)
    model, tx = Linear(config), optax.sgd(1.0)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(4, 2, 3, 4, 2)).astype(np.float32)
    batch = {"image": image, "label": rng.integers(0, 3, (4, 2, 3, 4)).astype(np.int32)}
    results = []
    for accumulate in (1, 2):
        train_step = make_train_step(model, tx, cross_entropy_loss, accumulate=accumulate)
        state, metrics = train_step(create_state(model, tx, seed=0), batch)
        results.append((state.params, metrics))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_each_part_updates_the_running_statistics_in_turn(small, batch):
    tx = optax.sgd(0.0)
    train_step = make_train_step(small, tx, dice_cross_entropy_loss, accumulate=2)
    state, _ = train_step(create_state(small, tx, seed=0), batch)
    means = batch["image"].mean(axis=(1, 2, 3))
    expected = 0.5 * (0.5 * means[0]) + 0.5 * means[1]
    np.testing.assert_allclose(state.batch_stats["BatchNorm_0"]["mean"], expected, rtol=1e-5)


def test_the_batch_is_augmented_with_a_key_for_each_sample_and_step(small, batch):
    tx = optax.sgd(0.0)
    seen = []

    def augment(keys, image, label):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), jax.random.key_data(keys))
        return image, jnp.zeros_like(label)

    train_step = make_train_step(small, tx, cross_entropy_loss, augment=augment)
    state = create_state(small, tx, seed=0)
    for _ in range(2):
        state, metrics = train_step(state, batch)
    jax.effects_barrier()
    assert len({tuple(key) for keys in seen for key in keys}) == 4
    unchanged = make_train_step(small, tx, cross_entropy_loss)(create_state(small, tx, 0), batch)
    assert metrics["loss"] != unchanged[1]["loss"]


def test_equal_seeds_give_equal_states(small):
    states = [create_state(small, optax.adam(1.0), seed) for seed in (0, 0, 1)]
    kernels = [state.params["Dense_0"]["kernel"] for state in states]
    assert jnp.array_equal(kernels[0], kernels[1])
    assert not jnp.array_equal(kernels[0], kernels[2])
    assert jnp.array_equal(states[0].rng, states[1].rng)
    assert not jnp.array_equal(states[0].rng, states[2].rng)


def test_prediction_uses_running_statistics_and_drops_nothing(small, batch):
    state = create_state(small, optax.sgd(1.0), seed=0)
    predict = make_predict(small)
    both = predict(state.variables, batch["image"])
    alone = predict(state.variables, batch["image"][1:])
    assert both.shape == (2, 4, 6, 8, 3)
    np.testing.assert_allclose(both[1:], alone, rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(small, batch):
    tx = optax.adam(1e-2)
    train_step = make_train_step(small, tx, dice_cross_entropy_loss)
    state, metrics = train_step(create_state(small, tx, seed=0), batch)
    assert not metrics["skipped"]
    before = jax.device_get(state)
    state, metrics = train_step(state, batch | {"image": batch["image"] * np.float32(np.nan)})
    assert metrics["skipped"]
    jax.tree.map(np.testing.assert_array_equal, before.replace(step=before.step + 1), state)
