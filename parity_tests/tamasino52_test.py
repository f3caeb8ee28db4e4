"""Compares the family of github.com/tamasino52/UNETR with its PyTorch twin."""

import numpy as np
import pytest
import torch

from parity_tests import configs
from parity_tests.gradients import evaluation_rows
from unetr_flax import UNETRConfig
from unetr_flax.parity.activations import activation_rows
from unetr_flax.parity.rows import assert_rows
from unetr_flax.parity.torch_models import torch_model_of
from unetr_flax.parity.twins import make_twins, precise, randomize
from unetr_flax.weights import from_torch, to_torch
from unetr_flax.weights.counters import BATCH_COUNTER
from unetr_flax.weights.unused_keys import unused_keys

CONFIGS = {
    "12 blocks": UNETRConfig.tamasino52(
        (16, 32, 48), 2, 3, hidden_size=24, num_heads=3, mlp_dim=40, width=4
    ),
    "4 blocks": UNETRConfig.tamasino52(
        (32, 16, 48), 4, 2, hidden_size=32, num_layers=4, num_heads=2, mlp_dim=20, width=2
    ),
    "5 blocks, patches of 8, 4 and 2": configs.TAMASINO52,
}
ALL = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)


@pytest.mark.parametrize(
    "name", [pytest.param("12 blocks", marks=pytest.mark.slow), *list(CONFIGS)[1:]]
)
def test_float64_forward_and_gradients(name):
    with precise():
        assert_rows(evaluation_rows(make_twins(CONFIGS[name], "float64")))


@ALL
def test_float32_forward(cfg):
    with precise():
        assert_rows(activation_rows(make_twins(cfg, "float32")))


@ALL
def test_round_trip_is_exact_and_loads_strictly(cfg):
    model = torch_model_of(cfg)
    randomize(model, seed=0)
    state = model.state_dict()
    back = to_torch(from_torch(state, cfg), cfg)
    assert set(back) == {
        k for k in state if "encoder_norm" not in k and not k.endswith(BATCH_COUNTER)
    }
    for key, value in back.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, state[key].numpy(), err_msg=key)
    tensors = {key: torch.from_numpy(v) for key, v in (unused_keys(cfg) | back).items()}
    torch_model_of(cfg).load_state_dict(tensors, strict=True)
