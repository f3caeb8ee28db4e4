"""The command's comparison, on its own; that the families agree is proven in parity_tests."""

import importlib.util
import re
from unittest import mock

import numpy as np
import pytest

from unetr_flax import UNETRConfig
from unetr_flax.parity.diagnose import told
from unetr_flax.parity.torch_models import TorchModelError, torch_model_of
from unetr_flax.parity.twins import randomize
from unetr_flax.parity.verify import Inputs, explain, verify
from unetr_flax.weights import WeightsError
from unetr_flax.weights.mapping import module_pairs

CFG = UNETRConfig.reference(
    (16, 8, 24), 2, 3, 32, patch_size=8, hidden_size=12, num_layers=4, num_heads=3, mlp_dim=7
)
RUNGS = ("activations", "skip features", "attention maps", "decoder stages", "logits")


@pytest.fixture(scope="module")
def state_dict():
    model = torch_model_of(CFG)
    randomize(model, seed=3)
    return model.state_dict()


def test_every_module_in_both_dtypes_on_random_images_and_a_volume(state_dict):
    volume = np.random.default_rng(5).random((1, 16, 8, 24, 2), np.float32)
    rows = verify(CFG, state_dict, Inputs(volume=volume))
    assert all(row.ok for row in rows)
    counts = {}
    for row in rows:
        counts[row.rung, row.dtype] = counts.get((row.rung, row.dtype), 0) + 1
    modules = len([p for p in module_pairs(CFG) if p.kind not in ("single_conv", "single_deconv")])
    numbers = (modules, 4, CFG.num_layers, 4, 1)
    assert counts == {
        (rung + suffix, dtype): number
        for dtype in ("float64", "float32")
        for suffix in ("", ", volume")
        for rung, number in zip(RUNGS, numbers, strict=True)
    }
    assert {row.shape[0] for row in rows if row.rung.endswith("volume")} == {1}
    assert {row.shape[0] for row in rows if not row.rung.endswith("volume")} == {2}


def test_a_port_that_is_wrong_somewhere_does_not_hold(state_dict):
    inputs = Inputs(batch=1)
    with mock.patch("flax.linen.relu", lambda x: x):
        rows = verify(CFG, state_dict, inputs)
        findings, meaning = explain(CFG, state_dict, rows, inputs)
    failed = {row.rung for row in rows if not row.ok}
    assert failed == {"activations", "decoder stages", "logits"}
    assert meaning == ""
    assert {finding.cause for finding in findings} == {"no activation instead of ReLU in Flax"}
    (line,) = told(findings)
    assert line.startswith("decoder9.block.2: differs by ")
    assert "the same in 16 more: decoder9_upsampler.0.block.1, " in line


def test_a_missing_package_is_told_before_anything_is_compiled(state_dict, monkeypatch):
    monkeypatch.setattr("unetr_flax.parity.verify.compile_evaluation", lambda *given: 1 / 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TorchModelError, match=r"^unetr_torch_ref: not installed"):
        verify(CFG, state_dict)


def test_what_does_not_fit(state_dict):
    with pytest.raises(ValueError, match=re.escape("volume: shape (16, 8, 24, 2), must be (batch")):
        verify(CFG, state_dict, Inputs(volume=np.zeros((16, 8, 24, 2))))
    with pytest.raises(WeightsError, match=r"unexpected: decoder0\.9\.weight"):
        verify(CFG, {**state_dict, "decoder0.9.weight": np.zeros(3)})
