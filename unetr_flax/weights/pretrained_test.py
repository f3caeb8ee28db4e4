import json
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
import safetensors.numpy
from flax import traverse_util

from unetr_flax import UNETR, Preprocessing, UNETRConfig
from unetr_flax.imaging.intensity import Percentiles, Window, ZScore
from unetr_flax.weights import (
    CheckpointError,
    WeightsError,
    load_pretrained,
    read_metadata,
    save_pretrained,
)

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 8, "num_heads": 2, "num_layers": 4}
CFG = UNETRConfig.reference((16, 32, 16), 1, 2, 16, **SIZES)
OTHER = UNETRConfig.reference((32, 16, 16), 2, 3, 16, **SIZES)
LEAF = "params/encoder/block_0/norm1/scale"
PREPROCESSING = Preprocessing(("T1",), (ZScore(),), ("background", "tumor"), spacing=(1, 1, 2))
PROVENANCE = {"source": "UNETR_model.pt", "description": "state dict"}


def variables_of(cfg, seed=0):
    x = jax.ShapeDtypeStruct((1, *cfg.img_size, cfg.in_channels), jnp.float32)
    shapes = jax.eval_shape(UNETR(cfg).init, jax.random.key(0), x)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


VARIABLES = variables_of(CFG)
NEW = variables_of(OTHER, seed=1)


def flat(variables):
    return traverse_util.flatten_dict(variables, sep="/")


def changed(name, change):
    leaves = flat(VARIABLES)
    leaves[name] = change(leaves[name])
    return traverse_util.unflatten_dict(leaves, sep="/")


def assert_same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert isinstance(a[name], np.ndarray)
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == np.asarray(b[name]).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "runs" / "model"
    save_pretrained(path, CFG, VARIABLES, preprocessing=PREPROCESSING, provenance=PROVENANCE)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """Copies the saved model, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def rewrite(folder, *, leaves=None, header=None):
    """Writes model.safetensors and config.json with other leaves or another header."""
    old = read_raw(folder)
    text = json.dumps({**old, **(header or {})})
    leaves = flat(VARIABLES) if leaves is None else leaves
    safetensors.numpy.save_file(leaves, folder / "model.safetensors", {"unetr_flax": text})
    (folder / "config.json").write_text(text)


def read_raw(folder):
    return json.loads((folder / "config.json").read_text())


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


# The header that training wrote in version 1, literally.
VERSION_1 = """{"format": "unetr_flax", "version": 1, \
"config": {"family": "reference", "img_size": [16, 32, 16], "in_channels": 1, "out_channels": 2, \
"patch_size": [16, 16, 16], "proj_type": "conv", "hidden_size": 8, "num_layers": 4, \
"num_heads": 2, "mlp_dim": 32, "qkv_bias": true, "skip_layers": [1, 2, 3, 4], \
"channels": [4, 8, 16, 32], "skip_convs": true, "block": "conv", "norm": "batch", \
"norm_groups": null, "norm_affine": true, "dropout_rate": 0.0}, \
"preprocessing": {"modalities": ["CT"], "spacing": [1.5, 1.5, 3.0], \
"labels": ["background", "box"]}, \
"provenance": {"dataset": "Boxes", "fingerprint": "0", "step": 12}}"""
VERSION_1_PREPROCESSING = (
    '{"modalities": ["CT"], "spacing": [1.5, 1.5, 3.0], "labels": ["background", "box"]}'
)


def write_version_1(folder, preprocessing=VERSION_1_PREPROCESSING):
    assert VERSION_1_PREPROCESSING in VERSION_1
    text = VERSION_1.replace(VERSION_1_PREPROCESSING, preprocessing)
    leaves = flat(VARIABLES)
    safetensors.numpy.save_file(leaves, folder / "model.safetensors", {"unetr_flax": text})
    (folder / "config.json").write_text(text)


def test_a_folder_of_version_1_loads_with_the_rules_of_then(tmp_path):
    write_version_1(tmp_path)
    cfg, variables = load_pretrained(tmp_path)
    assert cfg == CFG
    assert_same(variables, VARIABLES)
    metadata = read_metadata(tmp_path)
    assert metadata["preprocessing"] == Preprocessing(
        ("CT",), (Window(-175, 250),), ("background", "box"), spacing=(1.5, 1.5, 3)
    )
    assert metadata["provenance"] == {"dataset": "Boxes", "fingerprint": "0", "step": 12}
    # The folder has the current version after the model is saved again.
    save_pretrained(tmp_path, cfg, variables, preprocessing=metadata["preprocessing"])
    assert read_raw(tmp_path)["version"] == 2
    assert read_metadata(tmp_path)["preprocessing"] == metadata["preprocessing"]


def test_version_1_normalized_everything_but_ct_as_mri(tmp_path):
    write_version_1(tmp_path, '{"modalities": ["T2"], "spacing": null, "labels": ["0", "1"]}')
    preprocessing = read_metadata(tmp_path)["preprocessing"]
    assert preprocessing == Preprocessing(("T2",), (Percentiles(0.5, 99.5),), ("0", "1"))


@pytest.mark.parametrize("text", ["null", '"z-score"', '{"window": [-175.0, 250.0]}'])
def test_other_text_of_version_1_is_no_preprocessing(tmp_path, text):
    write_version_1(tmp_path, text)
    assert read_metadata(tmp_path)["preprocessing"] is None
    assert load_pretrained(tmp_path)[0] == CFG


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"window": [0, 1]}, "preprocessing: unknown fields ['window']: must be ['modalities', "),
        ("z-score", "preprocessing: 'z-score': must be an object with the fields"),
        ({**PREPROCESSING.to_dict(), "spacing": 1}, "preprocessing: spacing=1: must be None or 3"),
        (
            {**PREPROCESSING.to_dict(), "intensity": [{"rule": "window", "low": 0, "high": "1"}]},
            "preprocessing: intensity[0]: high='1': low and high must be finite numbers",
        ),
        (
            Preprocessing.from_modalities(["T1", "T2"]).to_dict(),
            "preprocessing: modalities=('T1', 'T2'): must be 1, one per input channel",
        ),
    ],
)
def test_a_preprocessing_that_cannot_be_is_one_line(folder, value, message):
    rewrite(folder, header={"preprocessing": value})
    for read in (load_pretrained, read_metadata):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        assert str(error.value).startswith(f"{folder}/model.safetensors: {message}")
        assert "\n" not in str(error.value)


def test_a_file_in_place_of_the_folder(tmp_path):
    path = tmp_path / "model"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="there is a file"):
        save_pretrained(path, CFG, VARIABLES)
    assert path.read_text() == "mine"
    with pytest.raises(CheckpointError, match="a file, must be a folder"):
        load_pretrained(path)


def remove_folder(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    folder.rmdir()


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def truncate(folder):
    os.truncate(folder / "model.safetensors", 5000)


def without_header(folder):
    safetensors.numpy.save_file(flat(VARIABLES), folder / "model.safetensors")


def header_of_text(folder):
    metadata = {"unetr_flax": "{"}
    safetensors.numpy.save_file(flat(VARIABLES), folder / "model.safetensors", metadata)


def other_header(**values):
    return lambda folder: rewrite(folder, header=values)


def other_config(**values):
    def change(folder):
        old = read_raw(folder)
        text = json.dumps({**old, "config": {**old["config"], **values}})
        (folder / "config.json").write_text(text)

    return change


def config_of_text(text):
    return lambda folder: (folder / "config.json").write_bytes(text)


def config_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def extra_field(folder):
    text = json.dumps({**read_raw(folder), "author": "me"})
    (folder / "config.json").write_text(text)


BROKEN = {
    "no folder": (remove_folder, "no such folder with model.safetensors"),
    "no weights": (remove_weights, "model.safetensors: no such file"),
    "truncated": (truncate, "model.safetensors: damaged safetensors"),
    "no header": (without_header, "not from save_pretrained"),
    "header not JSON": (header_of_text, "model.safetensors: not JSON"),
    "another format": (other_header(format="pt"), "format must be 'unetr_flax'"),
    "another version": (other_header(version=3), "version 3, must be 1 or 2"),
    "version no number": (other_header(version=True), "version True, must be 1 or 2"),
    "config no dict": (other_header(config=[1]), "fields ["),
    "config differs": (
        other_config(num_heads=4, img_size=[16, 32, 32]),
        "differs from the header of model.safetensors in config.img_size, config.num_heads;",
    ),
    "config differs in type": (other_config(num_heads=2.0), "in config.num_heads;"),
    "config not JSON": (config_of_text(b"{'a'"), "config.json: not JSON"),
    "config not text": (config_of_text(b"\xff\xfe"), "config.json: cannot be read"),
    "config empty": (config_of_text(b""), "config.json: not JSON"),
    "config a list": (config_of_text(b"[]"), "config.json: format must be"),
    "config nested": (config_of_text(b"[" * 100_000), "config.json: not JSON"),
    "config a folder": (config_folder, "config.json: cannot be read"),
    "config with another field": (extra_field, "config.json: fields ['author'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused_by_one_line(folder, name):
    change, message = BROKEN[name]
    change(folder)
    for read in (load_pretrained, read_metadata):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        assert message in str(error.value)
        assert str(folder) in str(error.value)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [({"num_heads": 3}, "num_heads=3"), ({"color": "red"}, "unknown fields ['color']")],
)
def test_a_configuration_of_no_model(folder, values, message):
    rewrite(folder, header={"config": {**CFG.to_dict(), **values}})
    with pytest.raises(CheckpointError) as error:
        load_pretrained(folder)
    assert message in str(error.value)
    assert "model.safetensors: config: " in str(error.value)


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        (LEAF, None, f"missing: {LEAF} (8,)"),
        ("params/extra", np.ones(3, np.float32), "unexpected: params/extra (3,)"),
        (LEAF, np.ones(7, np.float32), f"shape: {LEAF} is (7,), must be (8,)"),
        (LEAF, np.ones(8, np.int32), f"{LEAF} is int32"),
        (LEAF, np.full(8, np.nan, np.float32), f"{LEAF}: 8 of 8 numbers are NaN"),
        (LEAF, np.full(8, np.inf, jnp.bfloat16), f"{LEAF}: 8 of 8 numbers are NaN"),
    ],
)
def test_leaves_that_do_not_fit_are_named(folder, name, leaf, message):
    leaves = {k: v for k, v in {**flat(VARIABLES), name: leaf}.items() if v is not None}
    rewrite(folder, leaves=leaves)
    with pytest.raises(WeightsError) as error:
        load_pretrained(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value).splitlines()[0]
