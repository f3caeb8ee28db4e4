import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from train.checkpoint import Checkpoints
from train.stand_in import Small
from train.state import abstract_state, create_state

MODEL = Small(types.SimpleNamespace(img_size=(4, 6, 8), in_channels=2, out_channels=3))
TX = optax.adam(1e-3)


@pytest.fixture
def abstract():
    return abstract_state(MODEL, TX, SingleDeviceSharding(jax.devices()[0]))


def state_at(step, seed):
    return create_state(MODEL, TX, seed).replace(step=jnp.int32(step))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_last_and_best_are_kept_apart_and_one_of_each(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last_step is checkpoints.best_step is None
    for step in (1, 2, 3):
        state = state_at(step, seed=step)
        if step != 3:
            checkpoints.save_best(state)
        checkpoints.save_last(state, {"step": step})
    checkpoints.close()
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["3"]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["2"]

    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.last_step, checkpoints.best_step) == (3, 2)
    state, resume_state = checkpoints.restore_last(abstract)
    assert_equal(state, state_at(3, seed=3))
    assert resume_state == {"step": 3}
    assert_equal(checkpoints.restore_best(abstract.variables), state_at(2, seed=2).variables)
    checkpoints.close()


def test_restores_to_the_sharding_asked_for(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_last(state_at(1, seed=0), {})
    state, _ = checkpoints.restore_last(abstract)
    checkpoints.close()
    wanted = jax.tree.map(lambda x: x.sharding, abstract)
    assert jax.tree.map(lambda x: x.sharding, state) == wanted


def test_saving_the_same_step_again_keeps_the_first(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_last(state_at(1, seed=0), {"n": 1})
    checkpoints.save_last(state_at(1, seed=5), {"n": 2})
    assert checkpoints.restore_last(abstract)[1] == {"n": 1}
    checkpoints.close()


def test_a_checkpoint_cut_off_while_it_was_written_does_not_count(tmp_path, abstract, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_last(state_at(1, seed=1), {"n": 1})
    # An object that JSON cannot hold fails in the midst of the save.
    with pytest.raises((TypeError, ValueError)):
        checkpoints.save_last(state_at(2, seed=2), {"n": object()})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last_step == 1
    assert checkpoints.restore_last(abstract)[1] == {"n": 1}
    checkpoints.close()
