"""The diagnosis of a trajectory names what is wrong with the first optimizer step that parts."""

import functools
import types

import pytest
import torch

from parity_tests import configs, trajectory
from parity_tests.small import tiny
from parity_tests.trajectory import TRAININGS, trajectory_findings
from unetr_flax.parity.diagnose import told
from unetr_flax.parity.twins import make_twins, precise

STEPS = 3
ADAMW, SGD = TRAININGS
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def twins():
    with precise():
        return make_twins(tiny(configs.SMALL), "float64")


@pytest.fixture(scope="module")
def steps(twins):
    """The Flax model's steps, which all errors planted in PyTorch's are compared with."""

    @functools.cache
    def steps_of(training):
        with precise():
            return list(flax_steps(twins, training, STEPS))

    flax_steps = trajectory._flax_steps
    return steps_of


@pytest.fixture
def explained(twins, steps, monkeypatch):
    monkeypatch.setattr(trajectory, "_flax_steps", lambda twins, training, count: steps(training))

    def explain(training):
        with precise():
            return trajectory_findings(twins, training, STEPS)

    return explain


def optimizer(monkeypatch, name, change):
    """Replaces one of PyTorch's optimizers as the trajectory sees it."""
    real = getattr(torch.optim, name)
    changed = types.SimpleNamespace(
        **{**vars(torch.optim), name: lambda *a, **kw: change(real, *a, **kw)}
    )
    monkeypatch.setattr(
        trajectory, "torch", types.SimpleNamespace(**{**vars(torch), "optim": changed})
    )


def with_options(**options):
    return lambda real, *args, **given: real(*args, **{**given, **options})


def coupled(real, *args, **options):
    return torch.optim.Adam(*args, **options)


def rate_ahead(monkeypatch):
    real = torch.optim.lr_scheduler.LambdaLR

    def late(update, rate):
        return real(update, lambda step: rate(step + 1))

    schedulers = types.SimpleNamespace(LambdaLR=late)
    changed = types.SimpleNamespace(**{**vars(torch.optim), "lr_scheduler": schedulers})
    monkeypatch.setattr(
        trajectory, "torch", types.SimpleNamespace(**{**vars(torch), "optim": changed})
    )


def clip_each(model, norm, max_norm):
    for parameter in model.parameters():
        if parameter.grad is not None:
            norm = parameter.grad.norm()
            parameter.grad = parameter.grad * torch.clamp(max_norm / norm, max=1)


def constant(decay):
    return lambda average, value, count: decay * average + (1 - decay) * value


@pytest.mark.parametrize("training", [ADAMW, pytest.param(SGD, marks=pytest.mark.slow)], ids=str)
def test_equal_trainings_are_not_accused(training, explained):
    assert told(explained(training)) == []


@pytest.mark.parametrize(
    ("training", "plant", "cause"),
    [
        (ADAMW, lambda m: optimizer(m, "AdamW", coupled), "weight decay added to the gradient"),
        (ADAMW, lambda m: optimizer(m, "AdamW", with_options(eps=1e-8)), "epsilon 1e-08 instead"),
        # Bias correction hides the betas in the first step.
        (
            ADAMW,
            lambda m: optimizer(m, "AdamW", with_options(betas=(0.9, 0.99))),
            "betas 0.9 and 0.99",
        ),
        (ADAMW, rate_ahead, "the learning rate of the next step (off by one)"),
        (ADAMW, lambda m: m.setattr(trajectory, "_torch_clip", clip_each), "by its own norm"),
        (ADAMW, lambda m: m.setattr(trajectory, "_torch_clip", lambda *a: None), "not clipped"),
        (ADAMW, lambda m: m.setattr(trajectory, "_torch_average", constant), "does not grow"),
        slow(
            SGD, lambda m: optimizer(m, "SGD", with_options(nesterov=True)), "Nesterov's momentum"
        ),
        slow(
            SGD, lambda m: optimizer(m, "SGD", with_options(momentum=0.5)), "momentum 0.5 instead"
        ),
        slow(SGD, lambda m: optimizer(m, "SGD", with_options(dampening=0.5)), "dampening 0.5"),
        slow(SGD, rate_ahead, "the learning rate of the next step (off by one)"),
    ],
)
def test_what_is_wrong_with_a_step_is_named(training, plant, cause, explained, monkeypatch):
    plant(monkeypatch)
    found = explained(training)
    assert found
    # A gradient with a small norm of its own is not clipped by it.
    causes = (cause, "not clipped") if "norm" in cause else (cause,)
    for finding in found:
        assert any(words in str(finding) for words in causes), told(found)
        assert "in PyTorch" in str(finding)
    assert any(cause in str(finding) for finding in found)
