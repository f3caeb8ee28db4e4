import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config import Config
from train.initial import check_initial, with_initial_weights
from train.options import RunOptions
from train.run_dir import OptionError
from train.state import initial_state
from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.weights import (
    resize_position_embedding,
    save_pretrained,
    to_torch,
    write_state_dict,
)

SIZES = {"feature_size": 2, "hidden_size": 12, "mlp_dim": 20, "num_heads": 2}
THEIRS = UNETRConfig.monai((32, 16, 16), 1, 2, **SIZES)
OURS = UNETRConfig.monai((16, 16, 48), 2, 3, **SIZES)


def filled(cfg, value):
    shapes = abstract_variables(UNETR(cfg))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), shapes)


def state_of(cfg):
    variables = jax.tree.map(jnp.asarray, filled(cfg, 0))
    return initial_state(variables, optax.sgd(0.1), jax.random.key(0), averaged=True)


def config(**options):
    cfg = Config()
    return dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, **options))


def values(tree):
    return {float(leaf.max()) for leaf in jax.tree.leaves(tree)}


def test_a_model_of_other_classes_channels_and_window(tmp_path):
    theirs = filled(THEIRS, 5)
    positions = np.random.default_rng(0).standard_normal((1, 2, 12)).astype(np.float32)
    theirs["params"]["encoder"]["embedding"]["position_embedding"] = positions
    save_pretrained(tmp_path / "model", THEIRS, theirs)
    state, told = with_initial_weights(state_of(OURS), config(init=tmp_path / "model"), OURS)
    params = state.params
    assert values(params["encoder"]["block_3"]) == {5}
    assert values(params["decoder"]["stage_0"]) == {5}
    _, resized = resize_position_embedding(THEIRS, theirs, OURS.img_size)
    jax.tree.map(
        np.testing.assert_array_equal,
        params["encoder"]["embedding"]["position_embedding"],
        resized["params"]["encoder"]["embedding"]["position_embedding"],
    )
    assert values(params["decoder"]["head"]) == {0}
    assert "positions interpolated; not loaded, since classes or channels differ: " in told
    assert "decoder/head/bias, decoder/head/kernel" in told
    jax.tree.map(np.testing.assert_array_equal, state.average["params"], params)


def test_an_encoder_from_elsewhere(tmp_path):
    theirs = UNETRConfig.monai((32, 32, 32), 1, 2, **SIZES)
    weights = to_torch(filled(theirs, 5), theirs)
    encoder = {key: value for key, value in weights.items() if key.startswith("vit.")}
    write_state_dict(tmp_path / "vit.safetensors", encoder, {})
    options = config(init_encoder=tmp_path / "vit.safetensors")
    state, told = with_initial_weights(state_of(OURS), options, OURS)
    assert values(state.params["encoder"]["block_11"]) == {5}
    assert values(state.params["decoder"]) == {0}
    assert "137 keys loaded, 0 skipped, 2 resized" in told


def test_what_does_not_fit_is_one_line(tmp_path):
    other = UNETRConfig.monai((32, 16, 16), 1, 2, **{**SIZES, "mlp_dim": 24})
    save_pretrained(tmp_path / "model", other, filled(other, 5))
    with pytest.raises(OptionError, match=r"--init .*contract/kernel is .24, 12.*only channels"):
        with_initial_weights(state_of(OURS), config(init=tmp_path / "model"), OURS)
    write_state_dict(tmp_path / "vit.safetensors", to_torch(filled(THEIRS, 5), THEIRS), {})
    options = config(init_encoder=tmp_path / "vit.safetensors")
    with pytest.raises(OptionError, match=r"--init-encoder .*unetr convert .*--encoder-img-size"):
        with_initial_weights(state_of(OURS), options, OURS)
    with pytest.raises(OptionError, match=r"--init-encoder .*none: no such file"):
        check_initial(config(init_encoder=tmp_path / "none"))
    with pytest.raises(OptionError, match="only one of them"):
        check_initial(config(init_encoder=tmp_path, init=tmp_path))


@pytest.mark.parametrize("option", ["init", "init_encoder"])
def test_a_run_that_goes_on_needs_its_first_weights_only_if_it_has_none(option, tmp_path):
    cfg = dataclasses.replace(config(**{option: tmp_path / "gone"}), run=RunOptions(resume="yes"))
    check_initial(cfg)
    with pytest.raises(OptionError, match=f"^--{option.replace('_', '-')} .*gone"):
        with_initial_weights(state_of(OURS), cfg, OURS)


def test_arrays_that_fit_are_not_taken_from_a_model_that_computes_something_else(tmp_path):
    deeper = dataclasses.replace(THEIRS, num_layers=13, skip_layers=(4, 7, 10, 13))
    biased = dataclasses.replace(THEIRS, qkv_bias=True)
    state = state_of(OURS)
    for theirs, told in ((deeper, "num_layers=13, .* 12"), (biased, "qkv_bias=True, .* False")):
        save_pretrained(tmp_path / told[:3], theirs, filled(theirs, 5))
        with pytest.raises(OptionError, match=f"--init .*: {told}; only channels, classes"):
            with_initial_weights(state, config(init=tmp_path / told[:3]), OURS)


def test_without_options_nothing_changes():
    state = state_of(OURS)
    assert with_initial_weights(state, config(), OURS) == (state, "")
