"""Model folders that are damaged or hold no model: each is refused by one line."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from unetr_flax import Preprocessing
from unetr_flax.weights import (
    CheckpointError,
    WeightsError,
    load_pretrained,
    read_metadata,
)
from unetr_flax.weights.testing import (
    CFG,
    LEAF,
    PREPROCESSING,
    VARIABLES,
    flat,
    read_raw,
    rewrite,
    save_model,
)


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


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
