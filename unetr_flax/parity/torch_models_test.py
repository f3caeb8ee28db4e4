import importlib.util
import re
import sys

import pytest
import torch

from unetr_flax import UNETRConfig
from unetr_flax.parity.torch_models import (
    TorchModelError,
    check_installed,
    load_weights,
    torch_model_of,
)
from unetr_flax.parity.twins import randomize
from unetr_flax.weights.unused_keys import unused_keys

REFERENCE = UNETRConfig.reference(
    (16, 8, 24), 2, 3, 32, patch_size=8, hidden_size=12, num_layers=4, num_heads=3, mlp_dim=7
)
MONAI = UNETRConfig.monai((32, 16), 2, 3, 2, 12, 7, 3)
TAMASINO52 = UNETRConfig.tamasino52(
    (32, 16, 48), 2, 3, hidden_size=12, num_heads=3, mlp_dim=7, width=2
)
ALL = pytest.mark.parametrize("cfg", [REFERENCE, MONAI, TAMASINO52], ids=lambda cfg: cfg.family)


@ALL
def test_original_maps_images_to_logits(cfg):
    logits = torch_model_of(cfg)(torch.zeros(2, cfg.in_channels, *cfg.img_size))
    assert logits.shape == (2, cfg.out_channels, *cfg.img_size)


@ALL
def test_weights_are_loaded_from_any_wrapper_in_the_models_dtype(cfg):
    source = torch_model_of(cfg)
    randomize(source, seed=1)
    wrapped = {f"module.{key}": value for key, value in source.state_dict().items()}
    loaded = load_weights(torch_model_of(cfg).double(), {"state_dict": wrapped}, cfg)
    for key, value in loaded.state_dict().items():
        if not key.endswith("num_batches_tracked") and key not in unused_keys(cfg):
            assert torch.equal(value, source.state_dict()[key].to(value.dtype)), key
    assert all(p.dtype == torch.float64 for p in loaded.parameters())


@pytest.mark.parametrize("version", ["0.8", "1.3", "1.5"])
def test_weights_of_every_version_of_monai(version):
    state = {k: v for k, v in torch_model_of(MONAI).state_dict().items() if "cross" not in k}
    load_weights(torch_model_of(MONAI), state | unused_keys(MONAI, version), MONAI)


@ALL
def test_weights_that_do_not_fit_are_named(cfg):
    model = torch_model_of(cfg)
    state = model.state_dict()
    key = next(key for key in state if key.endswith("norm1.weight") or "norm.weight" in key)
    with pytest.raises(TorchModelError, match=re.escape(f"misses ['{key}'] and does not know []")):
        load_weights(model, {k: v for k, v in state.items() if k != key}, cfg)
    with pytest.raises(TorchModelError, match=re.escape("misses [] and does not know ['extra']")):
        load_weights(model, state | {"extra": torch.zeros(1)}, cfg)
    with pytest.raises(TorchModelError, match=f"size mismatch for {re.escape(key)}"):
        load_weights(model, state | {key: torch.zeros(5)}, cfg)


def test_a_missing_package_is_told_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TorchModelError, match=r"^monai: not installed, .* pip install monai$"):
        check_installed(MONAI)


def test_monai_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets.unetr", None)
    with pytest.raises(TorchModelError, match=r"not installed, .* pip install monai$"):
        torch_model_of(MONAI)
