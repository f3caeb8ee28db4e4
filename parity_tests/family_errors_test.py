"""Plants errors that ports of the other two families make; the comparison must fail by far."""

import contextlib
import dataclasses
from typing import Any
from unittest import mock

import pytest

from unetr_flax import UNETRConfig
from unetr_flax.model import blocks
from unetr_flax.model.family_spec import FAMILY_SPECS
from unetr_flax.parity.activations import activation_rows
from unetr_flax.parity.twins import make_twins, precise
from unetr_flax.weights import layouts
from unetr_flax.weights.layouts import Layout

SIZES = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 40, "num_heads": 3}
MONAI = UNETRConfig.monai((32, 48), 2, 3, **SIZES, proj_type="perceptron", qkv_bias=True)
TAMASINO52 = UNETRConfig.tamasino52(
    (16, 12, 4),
    2,
    3,
    patch_size=(8, 4, 2),
    hidden_size=12,
    num_layers=4,
    num_heads=3,
    mlp_dim=7,
    width=2,
)


def _changed(frozen: Any, **changes: Any):
    # The dataclass is frozen, so its fields are changed in its dictionary.
    return mock.patch.dict(vars(frozen), changes)


def _channels_first_patches(spatial_rank: int) -> Layout:
    assert spatial_rank == 2
    return Layout("o (i p0 p1)", "p0 p1 i o")


def _shared_statistics(features: int, style: Any, **fields: Any):
    # A group norm with one group of all channels, instead of one group for each channel.
    return blocks.UNetBlock(
        features, dataclasses.replace(style, norm="group", norm_groups=1), **fields
    )


ERRORS = {
    "halves of a join not exchanged": (MONAI, _changed(layouts.CONV_OF_CONCATENATION, swap=False)),
    "qkv split as (h d qkv)": (
        MONAI,
        _changed(layouts.QKV_OUTER_WEIGHT, torch="(h d qkv) e"),
    ),
    "bias of qkv split as (qkv d h)": (
        MONAI,
        _changed(layouts.QKV_OUTER_BIAS, torch="(qkv d h)"),
    ),
    "perceptron's patches with channels first": (
        MONAI,
        mock.patch.object(layouts, "perceptron", _channels_first_patches),
    ),
    "features after blocks 3, 6, 9 and 12": (
        dataclasses.replace(MONAI, skip_layers=(3, 6, 9, 12)),
        contextlib.nullcontext(),
    ),
    "attention scaled by the hidden size": (
        MONAI,
        _changed(FAMILY_SPECS["monai"], scale_by_head=False),
    ),
    "LeakyReLU of slope 0.2": (
        MONAI,
        mock.patch.object(blocks, "LEAKY_RELU_SLOPE", 0.2),
    ),
    "statistics over all channels": (
        MONAI,
        mock.patch.object(blocks, "conv_block", _shared_statistics),
    ),
    "LayerNorm epsilon 1e-5": (
        TAMASINO52,
        _changed(FAMILY_SPECS["tamasino52"], layer_norm_epsilon=1e-5),
    ),
    "GELU for ReLU": (TAMASINO52, _changed(FAMILY_SPECS["tamasino52"], activation="gelu")),
    "heads split as (d h)": (
        TAMASINO52,
        _changed(layouts.QKV_STACKED_WEIGHT, torch="qkv (d h) e"),
    ),
}


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize(("cfg", "plant"), ERRORS.values(), ids=ERRORS)
def test_planted_error_is_caught(cfg, plant):
    with precise(), plant:
        rows = activation_rows(make_twins(cfg, "float64"))
    assert max(row.relative / row.tolerance for row in rows) >= 100


@pytest.mark.parametrize("cfg", [MONAI, TAMASINO52], ids=lambda cfg: cfg.family)
def test_without_an_error_nothing_is_caught(cfg):
    with precise():
        assert all(row.ok for row in activation_rows(make_twins(cfg, "float64")))
