"""First steps of PyTorch's and optax's optimizers, losses and gradients with one difference."""

import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

from unetr_flax.parity.training import explain_gradients, explain_loss, explain_step
from unetr_flax.parity.twins import precise

RNG = np.random.default_rng(0)
BEFORE = {"weight": RNG.standard_normal((3, 4)), "bias": RNG.standard_normal(4)}
GRADIENTS = {name: 0.1 * RNG.standard_normal(array.shape) for name, array in BEFORE.items()}
RATES = (0.1, 0.05)
RIGHT = {"learning_rates": RATES, "epsilon": 1e-6, "weight_decay": 0.05}


def torch_step(make, prepare=lambda parameters: None, **options):
    parameters = {
        name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in BEFORE.items()
    }
    for name, parameter in parameters.items():
        parameter.grad = torch.from_numpy(GRADIENTS[name].copy())
    prepare(list(parameters.values()))
    make(parameters.values(), **options).step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def adamw(**changes):
    options = {"lr": RATES[0], "eps": 1e-6, "weight_decay": 0.05, **changes}
    return torch_step(torch.optim.AdamW, **options)


def optax_step(update):
    with precise():
        updates, _ = update.update(GRADIENTS, update.init(BEFORE), BEFORE)
        return {n: np.asarray(p) for n, p in optax.apply_updates(BEFORE, updates).items()}


def clip_norm(parameters):
    torch.nn.utils.clip_grad_norm_(parameters, 0.1)


def clip_value(parameters):
    torch.nn.utils.clip_grad_value_(parameters, 0.1)


def clipped_adamw(prepare):
    options = {"lr": RATES[0], "eps": 1e-6, "weight_decay": 0.05}
    return torch_step(torch.optim.AdamW, prepare, **options)


STEPS = {
    "weight decay added to the gradient (not decoupled)": torch_step(
        torch.optim.Adam, lr=0.1, eps=1e-6, weight_decay=0.05
    ),
    "no weight decay": adamw(weight_decay=0.0),
    "epsilon 1e-08 instead of 1e-06": adamw(eps=1e-8),
    "the learning rate of the next step (off by one)": adamw(lr=RATES[1]),
    "epsilon inside the root": optax_step(
        optax.chain(
            optax.scale_by_adam(eps=0.0, eps_root=1e-6),
            optax.add_decayed_weights(0.05),
            optax.scale(-RATES[0]),
        )
    ),
    "no bias correction": {
        name: BEFORE[name] * (1 - 0.1 * 0.05) - 0.1 * 0.1 * g / (np.sqrt(1e-3 * g**2) + 1e-6)
        for name, g in GRADIENTS.items()
    },
}


@pytest.mark.parametrize("text", STEPS)
def test_step_of_adamw(text):
    (first, *_) = explain_step("adam", BEFORE, GRADIENTS, adamw(), STEPS[text], right=RIGHT)
    assert f"explained by {text} in PyTorch" in str(first)


def test_step_with_one_rate_that_nothing_explains():
    right = {**RIGHT, "learning_rates": RATES[:1]}
    other = {name: array + 0.1 * array**3 for name, array in adamw().items()}
    found = explain_step("adam", BEFORE, GRADIENTS, adamw(), other, right=right)
    assert len(found) == 2
    assert all("no known cause explains it" in str(finding) for finding in found)


def test_steps_in_float32_are_refused():
    narrow = {name: array.astype(np.float32) for name, array in adamw().items()}
    with pytest.raises(ValueError, match=r"weight: float32, must be float64"):
        explain_step("adam", BEFORE, GRADIENTS, adamw(), narrow, right=RIGHT)


def test_steps_that_agree_are_not_accused():
    optax_adamw = optax_step(optax.adamw(RATES[0], eps=1e-6, weight_decay=0.05))
    assert explain_step("adam", BEFORE, GRADIENTS, optax_adamw, adamw(), right=RIGHT) == []
    sgd = torch_step(torch.optim.SGD, lr=RATES[0], momentum=0.9)
    with precise():
        other = optax_step(optax.sgd(RATES[0], momentum=0.9))
    right = {"learning_rates": RATES, "momentum": 0.9}
    assert explain_step("sgd", BEFORE, GRADIENTS, other, sgd, right=right) == []


@pytest.mark.parametrize(
    ("text", "prepare"),
    [
        ("gradients not clipped", lambda parameters: None),
        ("gradients clipped by value", clip_value),
        ("each gradient clipped by its own norm", lambda ps: [clip_norm([p]) for p in ps]),
    ],
)
def test_clipping(text, prepare):
    right = {"learning_rates": RATES, "clip": 0.1, "clip_epsilon": 1e-6}
    steps = [torch_step(torch.optim.SGD, how, lr=RATES[0]) for how in (clip_norm, prepare)]
    found = explain_step("sgd", BEFORE, GRADIENTS, *steps, right=right)
    assert found
    assert all(f"explained by {text} in PyTorch" in str(finding) for finding in found)


LOGITS = RNG.standard_normal((2, 3, 4, 4))
LABELS = RNG.integers(0, 3, (2, 4, 4))


def torch_loss(**options):
    logits = torch.from_numpy(LOGITS.copy()).requires_grad_()
    value = F.cross_entropy(logits, torch.from_numpy(LABELS), **options)
    value.backward()
    return value.detach().numpy(), logits.grad.numpy()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("label smoothing 0.1", {"label_smoothing": 0.1}),
        ("cross-entropy summed instead of averaged over voxels", {"reduction": "sum"}),
    ],
)
def test_loss(text, options):
    right = {"parts": "cross-entropy"}
    (found,) = explain_loss(LOGITS, LABELS, torch_loss(), torch_loss(**options), right=right)
    assert f"explained by {text} in PyTorch" in str(found)
    assert explain_loss(LOGITS, LABELS, torch_loss(), torch_loss(), right=right) == []


def test_gradients():
    scaled = {name: 12 * gradient for name, gradient in GRADIENTS.items()}
    found = explain_gradients(scaled, GRADIENTS)
    assert [finding.name for finding in found] == ["bias", "weight"]
    assert all("explained by multiplied by 12 in Flax" in str(finding) for finding in found)
    frozen = {**GRADIENTS, "bias": 0 * GRADIENTS["bias"]}
    (found,) = explain_gradients(frozen, GRADIENTS)
    assert "bias, gradient: differs by 1.0e+00; explained by no gradient at all" in str(found)
    assert explain_gradients(GRADIENTS, GRADIENTS) == []
    lost = {**GRADIENTS, "bias": GRADIENTS["bias"] * np.nan}
    for ours, theirs in ((lost, GRADIENTS), (GRADIENTS, lost), (lost, lost)):
        (found,) = explain_gradients(ours, theirs, negligible=1e-12)
        assert str(found).startswith("bias, gradient: numbers that are not finite in")
