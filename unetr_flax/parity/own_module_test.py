"""Modules of somebody's own: how they are found, given weights, and compared."""

import re

import pytest
import torch
from torch import nn

from unetr_flax import UNETRConfig, cli
from unetr_flax.parity.activations import first_tensor
from unetr_flax.parity.own_module import adopt, load_module
from unetr_flax.parity.torch_models import TorchModelError, torch_model_of
from unetr_flax.parity.twins import randomize

CFG = UNETRConfig.reference(
    (16, 8, 24), 2, 3, 32, patch_size=8, hidden_size=12, num_layers=4, num_heads=3, mlp_dim=7
)

FILE = """
from torch import nn
from helper import ATTRIBUTE
from unetr_torch_ref import UNETR

NO_FUNCTION = 3


def make():
    model = UNETR((16, 8, 24), 2, 3, 12, 8, 3, 0.0, 32, num_layers=4, mlp_dim=7,
                  ext_layers=(1, 2, 3, 4))
    model.transformer.layers[2][1].fn[1] = nn.GELU("tanh")
    wrapper = nn.Sequential(nn.Identity())
    setattr(wrapper, ATTRIBUTE, model)
    return wrapper


def wrong():
    return 3


def fails():
    raise RuntimeError("no data")
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "helper.py").write_text('ATTRIBUTE = "net"\n')
    (tmp_path / "port.py").write_text(FILE)
    return tmp_path / "port.py"


@pytest.fixture(scope="module")
def state_dict():
    model = torch_model_of(CFG)
    randomize(model, seed=3)
    return model.state_dict()


def test_module_gets_the_weights_that_it_has(file, state_dict):
    module = load_module(f"{file}:make")
    prefix, notes = adopt(module, state_dict, CFG)
    assert (prefix, notes) == ("net.", [])
    own = module.state_dict()
    for key, value in state_dict.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(own[f"net.{key}"], value.double())


def test_weights_in_float64_are_not_rounded(state_dict):
    wide = {
        key: value.double() / 3 if value.is_floating_point() else value
        for key, value in state_dict.items()
    }
    module = torch_model_of(CFG)
    adopt(module, wide, CFG)
    own = module.state_dict()
    assert all(torch.equal(own[key], value) for key, value in wide.items())


def test_a_file_may_define_dataclasses_with_annotations_that_are_not_evaluated(tmp_path):
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from typing import ClassVar\n"
        "from torch import nn\n"
        "@dataclasses.dataclass\n"
        "class Sizes:\n"
        "    most: ClassVar[int] = 3\n"
        "    width: int = 2\n"
        "def make():\n"
        "    return nn.Linear(Sizes().width, Sizes.most)\n"
    )
    assert load_module(f"{tmp_path / 'own.py'}:make").weight.shape == (3, 2)


def test_weights_of_one_side_only_are_told(state_dict):
    module = torch_model_of(CFG)
    module.transformer.layers[1][0].fn.qkv = nn.Linear(12, 36, bias=False)
    module.decoder0_header[2].block = nn.Conv3d(4, 3, 3)
    module.extra = nn.Linear(2, 2, bias=False)
    prefix, notes = adopt(module, state_dict, CFG)
    assert prefix == ""
    assert notes == [
        "transformer.layers.1.0.fn.qkv.bias: the module has none",
        "decoder0_header.2.block.weight: the module's shape is (3, 4, 3, 3, 3), the checkpoint's "
        "(3, 2, 1, 1, 1); not loaded",
        "extra.weight: only the module has it; as its factory made it",
    ]


def test_what_is_no_module_is_refused(file, state_dict):
    for place, message in (
        (f"{file}", "must be FILE.py:FACTORY"),
        (f"{file}.no:make", "no such file"),
        (f"{file}:missing", "has no function missing"),
        (f"{file}:NO_FUNCTION", "has no function NO_FUNCTION"),
        (f"{file}:wrong", "returned int, not a torch.nn.Module"),
        (f"{file}:fails", "RuntimeError: no data"),
    ):
        with pytest.raises(TorchModelError, match=re.escape(message)):
            load_module(place)
    with pytest.raises(TorchModelError, match="none of the names of this family"):
        adopt(nn.Linear(3, 3), state_dict, CFG)


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (torch.ones(2), "torch.float32"),
        ({"out": torch.ones(2).double()}, "a dict"),
        ((), "a tuple"),
        ((None, torch.ones(2).double()), "a NoneType"),
    ],
)
def test_output_that_cannot_be_compared_is_refused(output, found):
    message = f"decoder.norm: the module's output is {found}, must be torch.float64"
    with pytest.raises(TorchModelError, match=re.escape(message)):
        first_tensor(output, "decoder.norm", "float64")
    tensor = torch.ones(2).double()
    assert first_tensor((tensor, None), "decoder.norm", "float64") is tensor


@pytest.mark.slow
def test_command_says_what_the_module_does_differently(
    file, state_dict, tmp_path, monkeypatch, capsys
):
    torch.save(state_dict, tmp_path / "best.pth")
    options = ["--num-heads", "3", "--img-size", "16", "8", "24", "--torch-module", f"{file}:make"]
    monkeypatch.setattr("sys.argv", ["unetr", "verify", str(tmp_path / "best.pth"), *options])
    assert cli.main() == 1
    printed = capsys.readouterr().out
    assert re.search(
        r"transformer\.layers\.2\.1\.fn\.3, activation: differs by \S+; explained by GELU by tanh "
        r"instead of the exact GELU in the module",
        printed,
    )
    assert printed.count("explained by") == 1
