"""Compares MONAI's family with the package itself, option by option."""

import numpy as np
import pytest
import torch
from monai.networks.nets.unetr import UNETR

from parity_tests.gradients import gradient_rows
from parity_tests.monai_configs import ALL, COVERING, WITH_GRADIENTS
from parity_tests.monai_grid import grid_rows
from unetr_flax import UNETRConfig
from unetr_flax.parity.activations import activation_rows
from unetr_flax.parity.rows import assert_rows
from unetr_flax.parity.torch_models import torch_model_of
from unetr_flax.parity.twins import make_twins, precise, randomize
from unetr_flax.weights import from_torch, to_torch
from unetr_flax.weights.counters import BATCH_COUNTER
from unetr_flax.weights.unused_keys import unused_keys


def unless(default: tuple[str, ...]) -> list:
    """Parametrizes the whole grid; configurations outside of `default` are marked slow."""
    return [
        pytest.param(name, marks=() if name in default else pytest.mark.slow, id=name)
        for name in ALL
    ]


@pytest.mark.parametrize("name", unless(WITH_GRADIENTS))
def test_float64_forward_and_gradients(name):
    assert_rows(grid_rows(name, "float64"))


@pytest.mark.parametrize("name", [name for name in COVERING if name not in WITH_GRADIENTS])
def test_float64_forward(name):
    with precise():
        assert_rows(activation_rows(make_twins(UNETRConfig.monai(**ALL[name]), "float64")))


@pytest.mark.parametrize("name", unless(COVERING))
def test_float32_forward(name):
    assert_rows(grid_rows(name, "float32"))


def test_gradients_and_statistics_in_training_mode():
    cfg = UNETRConfig.monai(**ALL["2D, perceptron, batch norm"])
    with precise():
        rows = gradient_rows(make_twins(cfg, "float64"), train=True)
    assert "running statistics" in {row.rung for row in rows}
    assert_rows(rows)


@pytest.mark.parametrize("name", ALL)
def test_round_trip_is_exact_and_loads_strictly(name):
    model = UNETR(**ALL[name])
    randomize(model, seed=0)
    cfg = UNETRConfig.monai(**ALL[name])
    state = model.state_dict()
    back = to_torch(from_torch(state, cfg), cfg)
    idle = {key for key in state if "norm_cross_attn" in key or key.endswith(BATCH_COUNTER)}
    assert back.keys() == state.keys() - idle
    for key, value in back.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, state[key].numpy(), err_msg=key)
    tensors = {key: torch.from_numpy(v) for key, v in (unused_keys(cfg) | back).items()}
    UNETR(**ALL[name]).load_state_dict(tensors, strict=True)


@pytest.mark.parametrize("name", ALL)
def test_original_of_the_configuration_is_the_same_model(name):
    original = torch_model_of(UNETRConfig.monai(**ALL[name]))
    assert str(original) == str(UNETR(**ALL[name]))
