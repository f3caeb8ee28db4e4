import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from unetr_flax import UNETR, Preprocessing
from unetr_flax.weights import (
    CheckpointError,
    WeightsError,
    load_pretrained,
    read_metadata,
    save_pretrained,
)
from unetr_flax.weights.testing import (
    CFG,
    LEAF,
    OTHER,
    PREPROCESSING,
    PROVENANCE,
    VARIABLES,
    assert_same,
    flat,
    read_raw,
    save_model,
    variables_of,
)

ROOT = Path(__file__).parents[2]
NEW = variables_of(OTHER, seed=1)


def changed(name, change):
    leaves = flat(VARIABLES)
    leaves[name] = change(leaves[name])
    return traverse_util.unflatten_dict(leaves, sep="/")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "runs" / "model")


@pytest.fixture
def folder(saved, tmp_path):
    """Copies the saved model, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def test_round_trip(folder):
    cfg, variables = load_pretrained(str(folder))
    assert cfg == CFG
    assert_same(variables, VARIABLES)
    assert flat(variables)[LEAF].flags.writeable
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_loaded_variables_run(folder):
    cfg, variables = load_pretrained(folder)
    x = jnp.ones((2, *cfg.img_size, 1))
    apply = jax.jit(UNETR(cfg).apply)
    np.testing.assert_array_equal(apply(variables, x), apply(VARIABLES, x))


def test_metadata_is_in_both_files(folder):
    expected = {
        "config": CFG,
        "preprocessing": PREPROCESSING,
        "provenance": PROVENANCE,
    }
    assert read_metadata(folder) == expected
    assert read_raw(folder) == {
        "format": "unetr_flax",
        "version": 2,
        "config": CFG.to_dict(),
        "preprocessing": PREPROCESSING.to_dict(),
        "provenance": PROVENANCE,
    }
    (folder / "config.json").unlink()
    assert read_metadata(folder) == expected
    assert load_pretrained(folder)[0] == CFG


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_dtypes_are_kept(tmp_path, dtype):
    given = jax.tree.map(lambda leaf: leaf.astype(dtype), VARIABLES)
    given["batch_stats"] = VARIABLES["batch_stats"]
    save_pretrained(tmp_path, CFG, given)
    assert_same(load_pretrained(tmp_path)[1], given)


def test_takes_jax_arrays_frozen_dicts_and_views(tmp_path):
    given = jax.tree.map(jnp.asarray, changed(LEAF, lambda leaf: leaf[::-1]))
    save_pretrained(tmp_path / "jax", CFG, flax.core.freeze(given))
    assert_same(load_pretrained(tmp_path / "jax")[1], jax.tree.map(np.asarray, given))
    kernel = "params/encoder/block_0/feed_forward/expand/kernel"
    given = changed(kernel, lambda leaf: np.asfortranarray(leaf)[:, ::-1])
    save_pretrained(tmp_path / "views", CFG, given)
    assert_same(load_pretrained(tmp_path / "views")[1], given)


def test_replaces_a_model_of_another_configuration(folder):
    save_pretrained(folder, OTHER, NEW)
    cfg, variables = load_pretrained(folder)
    assert cfg == OTHER
    assert_same(variables, NEW)
    assert read_metadata(folder)["provenance"] is None


KILL = """
import os, sys
import unetr_flax.weights.pretrained_test as test
from unetr_flax.weights import save_pretrained
left = int(sys.argv[2])

def until_killed(function):
    def call(*args, **options):
        global left
        if not left:
            os._exit(9)
        left -= 1
        return function(*args, **options)
    return call

for name in ("mkdir", "fsync", "unlink", "replace"):
    setattr(os, name, until_killed(getattr(os, name)))
save_pretrained(sys.argv[1], test.OTHER, test.NEW)
"""


# A save calls, in this order: mkdir, fsync of both files, unlink of config.json, fsync of the
# folder, replace of model.safetensors, fsync, replace of config.json, fsync.
@pytest.mark.parametrize("steps", [1, 3, 5, 6, 7])
def test_a_killed_save_leaves_a_folder_that_loads(folder, steps):
    command = [sys.executable, "-c", KILL, str(folder), str(steps)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    cfg, variables = load_pretrained(folder)
    if steps <= 5:
        assert cfg == CFG
        assert_same(variables, VARIABLES)
        assert read_metadata(folder)["provenance"] == PROVENANCE
    else:
        assert cfg == OTHER
        assert_same(variables, NEW)
        assert read_metadata(folder)["provenance"] is None
    # Temporary files that were left behind do not disturb a later save.
    save_pretrained(folder, CFG, VARIABLES)
    assert load_pretrained(folder)[0] == CFG


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 6])
def test_a_failed_save_leaves_no_temporary_files(folder, monkeypatch, failing):
    calls = 0

    def counted(function):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError("No space left on device")
            return function(*args)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    with pytest.raises(OSError, match="No space"):
        save_pretrained(folder, OTHER, NEW)
    monkeypatch.undo()
    assert set(os.listdir(folder)) <= {"config.json", "model.safetensors"}
    assert load_pretrained(folder)[0] in (CFG, OTHER)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (NEW, "keys do not fit the model"),
        ({"params": VARIABLES["params"]}, "missing: batch_stats/"),
        ({**VARIABLES, "cache": {"a": np.ones(3)}}, "unexpected: cache/a"),
        (changed(LEAF, lambda leaf: leaf[:-1]), f"shape: {LEAF} is (7,), must be (8,)"),
        (changed(LEAF, lambda leaf: leaf.astype(int)), f"{LEAF} is int64, must be one of"),
        (changed(LEAF, lambda leaf: leaf * np.inf), f"{LEAF}: 8 of 8 numbers are NaN or infinite"),
    ],
)
def test_saves_only_what_fits(tmp_path, variables, message):
    with pytest.raises(WeightsError) as error:
        save_pretrained(tmp_path / "model", CFG, variables)
    assert message in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("value", [{"a": np.float32(1)}, [float("nan")], {(1, 2): 3}, object()])
def test_saves_only_what_json_can_hold(tmp_path, value):
    with pytest.raises(CheckpointError, match="provenance cannot be written as JSON"):
        save_pretrained(tmp_path / "model", CFG, VARIABLES, provenance=value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"modalities": ["CT"]}, "model: preprocessing is of type dict, must be a Preprocessing"),
        (
            Preprocessing.from_modalities(["T1", "T2"]),
            "preprocessing: modalities=('T1', 'T2'): must be 1, one per input channel of the model",
        ),
        (
            Preprocessing.from_modalities(["CT"], labels=["background"]),
            "preprocessing: labels=('background',): must be 2, one per class of the model",
        ),
    ],
)
def test_saves_only_a_preprocessing_that_fits_the_model(tmp_path, value, message):
    with pytest.raises(CheckpointError) as error:
        save_pretrained(tmp_path / "model", CFG, VARIABLES, preprocessing=value)
    assert message in str(error.value)
    assert not (tmp_path / "model").exists()


def test_preprocessing_may_be_unknown_and_so_may_the_names_of_classes(tmp_path):
    save_pretrained(tmp_path / "none", CFG, VARIABLES)
    assert read_metadata(tmp_path / "none")["preprocessing"] is None
    preprocessing = Preprocessing.from_modalities(["CT"])
    save_pretrained(tmp_path / "nameless", CFG, VARIABLES, preprocessing=preprocessing)
    assert read_metadata(tmp_path / "nameless")["preprocessing"] == preprocessing


def test_a_file_in_place_of_the_folder(tmp_path):
    path = tmp_path / "model"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="there is a file"):
        save_pretrained(path, CFG, VARIABLES)
    assert path.read_text() == "mine"
    with pytest.raises(CheckpointError, match="a file, must be a folder"):
        load_pretrained(path)
