"""The diagnosis of a backward pass names the module, and what its gradient is."""

import copy
import dataclasses

import jax
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parity_tests import configs
from parity_tests.gradients import random_labels
from parity_tests.small import tiny
from parity_tests.torch_faults import set_forward
from parity_tests.torch_loss import dice_cross_entropy
from unetr_flax import UNETRConfig
from unetr_flax.model import encoder
from unetr_flax.parity.backward import diagnose_backward
from unetr_flax.parity.diagnose import told
from unetr_flax.parity.twins import make_twins, precise

CFG = tiny(configs.SMALL)
MONAI = tiny(UNETRConfig.monai((32, 32, 32), 1, 2, feature_size=4, hidden_size=16, num_heads=2))


@pytest.fixture(scope="module")
def twins():
    with precise():
        return make_twins(CFG, "float64")


def findings(twins, plant=lambda model: None, *, train=False):
    with precise():
        model = copy.deepcopy(twins.torch_model)
        plant(model)
        twins = dataclasses.replace(twins, torch_model=model)
        labels = torch.from_numpy(random_labels(twins)).long()
        return diagnose_backward(twins, lambda x: dice_cross_entropy(x, labels), train=train)


def scaled(path, factor):
    """Multiplies the gradient by the input of a module by a factor."""
    return lambda model: model.get_submodule(path).register_full_backward_hook(
        lambda module, by_input, by_output: (factor * by_input[0],)
    )


class Wrong(torch.autograd.Function):
    """The ReLU, with LeakyReLU's gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, gradient, 0.1 * gradient)


class Doubled(torch.autograd.Function):
    """A copy, with twice its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def twice(linear, x):
    """Computes a linear map whose weight gets twice its gradient."""
    return F.linear(x, Doubled.apply(linear.weight), linear.bias)


class WrongReLU(nn.Module):
    def forward(self, x):
        return Wrong.apply(x)


def detached(path):
    """Detaches the input of a module."""
    return lambda model: model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: (args[0].detach(), *args[1:])
    )


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_equal_models_are_not_accused(train, twins):
    assert told(findings(twins, train=train)) == []


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_equal_models_of_monai_are_not_accused(train):
    with precise():
        twins = make_twins(MONAI, "float64")
    assert told(findings(twins, train=train)) == []


@pytest.mark.parametrize(
    ("plant", "names", "words"),
    [
        (
            scaled("transformer.layers.2.1.fn.0", 3),
            ["transformer.layers.2.1.fn.0"],
            "by its input: differs by 6.7e-01; explained by multiplied by 0.333333 in Flax",
        ),
        (
            lambda model: set_forward(model.get_submodule("transformer.layers.1.0.fn.qkv"), twice),
            ["transformer.layers.1.0.fn.qkv.weight"],
            "gradient: differs by 5.0e-01; explained by multiplied by 0.5 in Flax",
        ),
    ],
    ids=["input", "weight"],
)
def test_one_wrong_gradient_accuses_one_module(plant, names, words, twins):
    found = findings(twins, plant)
    assert [finding.name for finding in found] == names, told(found)
    assert words in str(found[0])


def test_a_wrong_activation_accuses_the_norm_before_it(twins):
    path = "decoder9_upsampler.0.block"
    found = findings(twins, lambda model: setattr(model.get_submodule(path), "2", WrongReLU()))
    assert {finding.name.removesuffix(".weight").removesuffix(".bias") for finding in found} == {
        f"{path}.1"
    }, told(found)


@pytest.mark.slow
def test_a_skip_that_is_detached_is_told_where_it_leaves_the_stream(twins):
    (found,) = findings(twins, detached("decoder9_upsampler.0.block.0.block"))
    assert str(found).startswith(
        "transformer.layers.2.0.norm, gradient by the residual stream before it: differs"
    )


@pytest.mark.slow
def test_an_error_in_the_flax_model_is_told(twins, monkeypatch):
    def stopped(x, **options):
        return jax.lax.stop_gradient(gelu(x, **options))

    gelu = encoder.ops.gelu
    monkeypatch.setattr(encoder.ops, "gelu", stopped)
    jax.clear_caches()
    other = dataclasses.replace(twins, model=twins.model.clone(stochastic_depth=0.01))
    found = findings(other)
    monkeypatch.undo()
    jax.clear_caches()
    names = [f"transformer.layers.{i}.1.fn.0" for i in reversed(range(CFG.num_layers))]
    assert [finding.name for finding in found] == names, told(found)
    assert all("by its output" in str(f) and "no gradient at all" in str(f) for f in found)
