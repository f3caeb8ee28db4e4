import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.ema import candidates, update_average
from train.losses import cross_entropy_loss
from train.stand_in import Small
from train.state import create_state
from train.step import make_train_step

MODEL = Small(types.SimpleNamespace(img_size=(4, 3, 2), in_channels=1, out_channels=2))


def test_the_average_equals_its_recursion():
    decay, average, values = 0.3, 5.0, np.random.default_rng(0).normal(size=10)
    ours = {"a": jnp.float32(average)}
    for step, value in enumerate(values):
        now = min(decay, (1 + step) / (10 + step))
        average = now * average + (1 - now) * value
        ours = update_average(ours, {"a": jnp.float32(value)}, jnp.int32(step), decay)
    np.testing.assert_allclose(ours["a"], average, rtol=1e-5)


def test_a_step_averages_parameters_and_statistics():
    tx = optax.sgd(1.0)
    state = create_state(MODEL, tx, seed=0, averaged=True)
    before = jax.device_get(state.variables)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(2, 4, 3, 2, 1)).astype(np.float32),
        "label": rng.integers(0, 2, (2, 4, 3, 2)).astype(np.int32),
    }
    state, _ = make_train_step(MODEL, tx, cross_entropy_loss, ema_decay=0.9)(state, batch)
    plain, averaged = candidates(state).values()
    assert plain is state
    # The first decay is 1 / 10, whatever the option is.
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, before, state.variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), averaged.variables, expected
    )
    assert not np.array_equal(before["batch_stats"], averaged.variables["batch_stats"])


def test_without_averages_the_state_competes_alone():
    state = create_state(MODEL, optax.sgd(1.0), seed=0)
    assert list(candidates(state)) == ["validation"]
