import dataclasses

import jax
import numpy as np
import pytest

from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.weights import CheckpointError, infer_config, to_torch
from unetr_flax.weights.unused_keys import unused_keys

SIZE = {"img_size": (32, 16, 48), "in_channels": 2, "out_channels": 3}
MONAI = {**SIZE, "feature_size": 8, "hidden_size": 24, "mlp_dim": 40, "num_heads": 4}
GROUP = ("group", {"num_groups": 2})
AFFINE = ("instance", {"affine": True})


def state_dict(cfg):
    """Zeros under the keys of a model, with those that it never applies."""
    shapes = abstract_variables(UNETR(cfg))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return {**to_torch(variables, cfg), **unused_keys(cfg)}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, {}),
        ({"in_channels": 8}, {}),
        ({"norm_name": "batch", "res_block": False}, {}),
        ({"norm_name": ("batch", {"affine": False})}, {}),
        ({"norm_name": GROUP}, {"norm_name": GROUP}),
        ({"norm_name": AFFINE}, {"norm_name": AFFINE}),
        ({"proj_type": "perceptron", "qkv_bias": True}, {}),
        ({"conv_block": False}, {}),
        ({"img_size": (48, 32), "in_channels": 3, "proj_type": "perceptron"}, {}),
        ({"dropout_rate": 0.1}, {"dropout_rate": 0.1}),
    ],
)
def test_monai_options(options, told):
    cfg = UNETRConfig.monai(**{**MONAI, **options})
    told = {"num_heads": 4, "img_size": cfg.img_size, **told}
    assert infer_config(state_dict(cfg), **told) == cfg


@pytest.mark.parametrize(
    "cfg",
    [
        UNETRConfig.reference(
            **SIZE, light_r=8, patch_size=(16, 8, 4), hidden_size=24, num_layers=4, num_heads=3
        ),
        UNETRConfig.reference(**SIZE, light_r=3.2, hidden_size=24, num_heads=3),
        UNETRConfig.tamasino52(**SIZE, hidden_size=24, num_heads=3, mlp_dim=40, width=8),
    ],
    ids=lambda cfg: cfg.family,
)
def test_families_of_conv_blocks(cfg):
    found = infer_config(state_dict(cfg), num_heads=3, img_size=cfg.img_size)
    assert found == cfg


@pytest.mark.parametrize("make", [UNETRConfig.reference, UNETRConfig.tamasino52])
def test_more_blocks_have_the_code_s_default(make):
    cfg = make(**SIZE, hidden_size=24, num_layers=16, num_heads=3, skip_layers=(3, 6, 9, 12))
    assert infer_config(state_dict(cfg), num_heads=3, img_size=cfg.img_size) == cfg


@pytest.mark.parametrize("make", [UNETRConfig.reference, UNETRConfig.tamasino52])
def test_blocks_that_feed_the_decoder_are_told_where_the_code_has_no_default(make):
    cfg = make(**SIZE, hidden_size=24, num_layers=5, num_heads=3, skip_layers=(1, 2, 4, 5))
    told = {"num_heads": 3, "img_size": cfg.img_size}
    with pytest.raises(CheckpointError, match="skip_layers: shapes do not tell which of 5 blocks"):
        infer_config(state_dict(cfg), **told)
    assert infer_config(state_dict(cfg), **told, skip_layers=(1, 2, 4, 5)) == cfg


def test_a_cube_is_seen_and_a_wrapped_checkpoint_unwrapped():
    cfg = dataclasses.replace(UNETRConfig.monai(**MONAI), img_size=(32, 32, 32))
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state_dict(cfg).items()}}
    assert infer_config(wrapped, num_heads=4) == cfg


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "told", "message"),
    [
        (dict, {}, "num_heads: .* default of family 'monai' is 12"),
        (dict, {"num_heads": 4}, "img_size: 6 position embeddings are not those of 3 equal axes"),
        (dict, {"num_heads": 5, "img_size": (32, 16, 48)}, "num_heads=5: must divide"),
        (
            dict,
            {"num_heads": 4, "skip_layers": (1, 2, 3, 4)},
            "skip_layers: cannot be given for family 'monai', whose",
        ),
        (without("out.conv.conv.weight"), {"num_heads": 4, "img_size": (1,)}, "out.conv.conv.w"),
        (
            without("vit.blocks.3.norm1.weight"),
            {"num_heads": 4},
            "transformer blocks .* have gaps",
        ),
        (
            without("vit.blocks.11.norm1.weight"),
            {"num_heads": 4},
            "11 transformer blocks, MONAI's UNETR has 12",
        ),
        (lambda state: {"conv1.weight": np.zeros(3)}, {"num_heads": 4}, "not a known UNETR"),
    ],
)
def test_what_is_not_told_is_asked_for(change, told, message):
    state = change(state_dict(UNETRConfig.monai(**MONAI)))
    with pytest.raises(ValueError, match=message):
        infer_config(state, **told)


def test_norms_that_look_the_same_are_asked_for():
    state = state_dict(UNETRConfig.monai(**MONAI, norm_name=GROUP))
    with pytest.raises(CheckpointError, match="norm_name: shapes do not tell group norms"):
        infer_config(state, num_heads=4, img_size=(32, 16, 48))
    reference = state_dict(UNETRConfig.reference(**SIZE, light_r=8, hidden_size=24, num_heads=3))
    with pytest.raises(CheckpointError, match="norm_name: cannot be given for family 'reference'"):
        infer_config(reference, num_heads=3, norm_name="batch")
