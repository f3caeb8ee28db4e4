import contextlib
import gc
import resource
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from train.checkpoint import CheckpointError, Checkpoints
from train.stand_in import Small
from train.state import abstract_state, create_state

MODEL = Small(types.SimpleNamespace(img_size=(4, 6, 8), in_channels=2, out_channels=3))
TX = optax.adam(1e-3)


@pytest.fixture
def abstract():
    return abstract_state(MODEL, TX, SingleDeviceSharding(jax.devices()[0]))


def state_at(step, seed):
    return create_state(MODEL, TX, seed).replace(step=jnp.int32(step))


def save_and_wait(checkpoints, *args):
    checkpoints.save_last(*args)
    checkpoints.wait()


def save_and_check(checkpoints, *args):
    """Saves, and asks for errors as the loop does."""
    checkpoints.save_last(*args)
    while True:
        checkpoints.check()


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
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["1", "2"]

    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.last_step, checkpoints.best_step) == (3, 2)
    state, resume_state = checkpoints.restore_last(abstract)
    assert_equal(state, state_at(3, seed=3))
    assert resume_state == {"step": 3}
    assert_equal(checkpoints.restore_best(abstract.variables), state_at(2, seed=2).variables)
    # A run that goes on from an earlier step finds the best of that time.
    checkpoints.forget_best_after(1)
    assert_equal(checkpoints.restore_best(abstract.variables, 1), state_at(1, seed=1).variables)
    checkpoints.close()


def test_restores_to_the_sharding_asked_for(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_last(state_at(1, seed=0), {})
    state, _ = checkpoints.restore_last(abstract)
    checkpoints.close()
    wanted = jax.tree.map(lambda x: x.sharding, abstract)
    assert jax.tree.map(lambda x: x.sharding, state) == wanted


def test_saving_the_same_step_again_keeps_the_state_and_takes_the_progress(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_last(state_at(1, seed=0), {"n": 1})
    checkpoints.save_last(state_at(1, seed=5), {"n": 2})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    state, resume_state = checkpoints.restore_last(abstract)
    assert_equal(state, state_at(1, seed=0))
    assert resume_state == {"n": 2}
    checkpoints.close()


def test_a_checkpoint_cut_off_while_it_was_written_does_not_count(tmp_path, abstract):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save_last(state_at(1, seed=1), {"n": 1})
    # An object that JSON cannot hold fails in the midst of the save.
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be written: .*serializable"):
        save_and_wait(checkpoints, state_at(2, seed=2), {"n": object()})
    checkpoints.close()
    checkpoints = Checkpoints(folder)
    assert checkpoints.last_step == 1
    assert checkpoints.restore_last(abstract)[1] == {"n": 1}
    checkpoints.close()


@contextlib.contextmanager
def files_of_at_most(number):
    """Makes the operating system refuse to write more bytes to a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_intact(tmp_path, abstract, capfd):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_last(state_at(1, seed=1), {"n": 1})
    checkpoints.wait()
    with files_of_at_most(50):
        said = f"^{tmp_path}: cannot be written: File too large$"
        with pytest.raises(CheckpointError, match=said):
            save_and_check(checkpoints, state_at(2, seed=2), {"n": 2})
        checkpoints.close()
    gc.collect()
    assert capfd.readouterr() == ("", "")

    # With room again, the step is saved as if nothing had happened.
    checkpoints = Checkpoints(tmp_path)
    state, resume_state = checkpoints.restore_last(abstract)
    assert_equal(state, state_at(1, seed=1))
    assert resume_state == {"n": 1}
    checkpoints.save_last(state_at(2, seed=2), {"n": 2})
    checkpoints.wait()
    assert_equal(checkpoints.restore_last(abstract)[0], state_at(2, seed=2))
    checkpoints.close()


def test_the_one_before_takes_the_place_of_a_damaged_checkpoint(tmp_path, abstract, capsys):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save_last(state_at(step, seed=step), {"n": step})
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["2", "3"]
    for path in (tmp_path / "last" / "3" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, keep=2)
    state, resume_state = checkpoints.restore_last(abstract)
    assert_equal(state, state_at(2, seed=2))
    assert resume_state == {"n": 2}
    assert f"{tmp_path}/last/3: cannot be read: " in capsys.readouterr().err
    # Training that gets to the step again saves it again.
    checkpoints.save_last(state_at(3, seed=3), {"n": 4})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_last(abstract)[1] == {"n": 4}
    checkpoints.close()


@pytest.fixture
def two_saved(tmp_path):
    """Checkpoints of the steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        save_and_wait(checkpoints, state_at(step, seed=step), {})
    yield checkpoints
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["1", "2"]


def test_checkpoints_of_which_none_can_be_read_are_kept(two_saved, abstract, monkeypatch, capsys):
    other = abstract_state(MODEL, optax.sgd(1e-3), SingleDeviceSharding(jax.devices()[0]))
    line = (
        r"^.*/last: no checkpoint can be read, and all are kept; 2: User.* match; 1: User.* match$"
    )
    with pytest.raises(CheckpointError, match=line):
        two_saved.restore_last(other)
    # Another process cannot read what this one can.
    answers = iter([False, True] * 2)
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoint.any_process", lambda flag: next(answers))
        with pytest.raises(CheckpointError, match=r"; 1: another process cannot read it$"):
            two_saved.restore_last(abstract)
    assert_equal(two_saved.restore_last(abstract)[0], state_at(2, seed=2))
    assert capsys.readouterr().err == ""


OUT_OF_FILES = "RESOURCE_EXHAUSTED: Failed to open: Too many open files [os_error_code='24']"


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (MemoryError(), MemoryError, "MemoryError"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nxx"),
            MemoryError,
            ".*Out of memory",
        ),
        (ValueError(OUT_OF_FILES), CheckpointError, "Too many open files"),
        (OSError(24, "Too many open files", "x"), CheckpointError, "Too many open files"),
    ],
)
def test_memory_and_files_that_run_out_condemn_no_checkpoint(
    two_saved, abstract, monkeypatch, error, kind, told
):
    tried = []

    def restore(step, args):
        tried.append(step)
        raise error

    monkeypatch.setattr(two_saved._last, "restore", restore)
    with pytest.raises(kind, match=f"/last/2: {told}$"):
        two_saved.restore_last(abstract)
    assert tried == [2]


@pytest.mark.parametrize("large", [False, True])
def test_a_state_may_be_donated_as_soon_as_it_is_being_saved(
    tmp_path, abstract, monkeypatch, large
):
    if large:
        monkeypatch.setattr("train.checkpoint.LARGEST_COPY", 0)
    state = state_at(1, seed=1)
    checkpoints = Checkpoints(tmp_path)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints.save_last(state, {})
    if large:
        # Nothing reads the state's buffers any more.
        assert (tmp_path / "last" / "1").exists()
    overwrite(state)
    checkpoints.wait()
    assert_equal(checkpoints.restore_last(abstract)[0], state_at(1, seed=1))
    checkpoints.close()


@pytest.mark.parametrize("large", [False, True])
def test_no_more_than_what_is_saved_is_copied_and_nothing_of_a_large_state(
    tmp_path, monkeypatch, large
):
    if large:
        monkeypatch.setattr("train.checkpoint.LARGEST_COPY", 0)

    def buffers():
        return {array.unsafe_buffer_pointer() for array in jax.live_arrays()}

    state = state_at(1, seed=1)
    checkpoints = Checkpoints(tmp_path)
    gc.collect()
    before = buffers()
    checkpoints.save_best(state)
    copied = len(buffers() - before)
    assert copied == (0 if large else len(jax.tree.leaves(state.variables)))
    checkpoints.close()
