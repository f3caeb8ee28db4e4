"""Training: running statistics, the loss with its gradient, optimizer steps, and averages."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from unetr_flax.parity.causes.explain import Arrays, Cause, Definition


def running_statistics(
    arrays: Arrays, *, momentum: float, variance: str = "unbiased", updated: bool = True
) -> torch.Tensor:
    """Updates the running mean and variance [2, C] by a batch x [B, C, *spatial]."""
    x, mean, var = arrays["x"], arrays["mean"], arrays["var"]
    axes = (0, *range(2, x.ndim))
    own = x.var(axes, correction=1 if variance == "unbiased" else 0)
    kept = 1 - momentum if updated else 1.0
    weight = momentum if updated else 0.0
    return torch.stack([kept * mean + weight * x.mean(axes), kept * var + weight * own])


def loss(
    arrays: Arrays,
    *,
    reduction: str = "mean",
    smoothing: float = 0.0,
    dice: str = "per class and volume",
    background: bool = True,
    epsilon: float = 1e-5,
    parts: str = "both",
) -> torch.Tensor:
    """Computes Dice and cross-entropy, and the gradient by the logits: [1 + the logits' size].

    Args:
      arrays: logits [B, K, *spatial] and labels [B, *spatial].
      reduction: "mean" or "sum" of the cross-entropy over voxels.
      smoothing: weight of the uniform distribution in the labels.
      dice: means of Dice "per class and volume", or "over the batch" per class, or "squared", with
        squares in the denominator.
      background: whether the first class counts in Dice.
      epsilon: number added to numerator and denominator of Dice.
      parts: "both", "cross-entropy", "dice" or "half" of their sum.
    """
    logits = arrays["logits"].detach().requires_grad_()
    labels = arrays["labels"].long()
    with torch.enable_grad():
        cross_entropy = F.cross_entropy(
            logits, labels, reduction=reduction, label_smoothing=smoothing
        )
        probabilities = logits.softmax(1)
        truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        axes = tuple(range(2, logits.ndim))
        if dice == "over the batch":
            axes = (0, *axes)
        if not background:
            probabilities, truth = probabilities[:, 1:], truth[:, 1:]
        size = probabilities**2 if dice == "squared" else probabilities
        overlap = (2 * (probabilities * truth).sum(axes) + epsilon) / (
            size.sum(axes) + truth.sum(axes) + epsilon
        )
        losses = {"cross-entropy": cross_entropy, "dice": (1 - overlap).mean()}
        both = losses["cross-entropy"] + losses["dice"]
        value = {**losses, "both": both, "half": both / 2}[parts]
        (gradient,) = torch.autograd.grad(value, logits)
    return torch.cat([value.detach().reshape(1), gradient.flatten()])


def adam_step(
    arrays: Arrays,
    *,
    learning_rates: Sequence[float],
    count: int = 0,
    ahead: int = 0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = "decoupled",
    correction: str = "both",
    epsilon_place: str = "after the root",
    clip: float | None = None,
    clipped: str = "by the global norm",
    clip_epsilon: float = 0.0,
) -> torch.Tensor:
    """Computes the change of a parameter in a step of AdamW (Loshchilov & Hutter 2019).

    Args:
      arrays: parameter, gradient, and norm, the norm of all gradients; after the first step also
        first and second, the moments before the step.
      learning_rates: the rates of the schedule's steps.
      count: number of steps before this one.
      ahead: number of steps by which the learning rate is ahead of the step.
      betas: decay rates of the moments.
      epsilon: number added to the root of the second moment.
      weight_decay: weight decay.
      decay: "decoupled", "coupled" (added to the gradient), "not scaled" by the learning rate, or
        "none".
      correction: which moments are divided by 1 - beta^t: "both", "neither", "first" or "second".
      epsilon_place: "after the root", "inside the root", or "before the correction".
      clip: largest norm of all gradients, None for no limit.
      clipped: "by the global norm", "by each norm", "by value" or "not".
      clip_epsilon: number added to the norm; 1e-6 in PyTorch's `clip_grad_norm_`.
    """
    parameter, gradient = arrays["parameter"], arrays["gradient"]
    gradient = _clipped(gradient, arrays, clip, clipped, clip_epsilon)
    if decay == "coupled":
        gradient = gradient + weight_decay * parameter
    first, second = (1 - betas[0]) * gradient, (1 - betas[1]) * gradient**2
    if count:
        first, second = first + betas[0] * arrays["first"], second + betas[1] * arrays["second"]
    one = 1 - betas[0] ** (count + 1) if correction in ("both", "first") else 1.0
    two = 1 - betas[1] ** (count + 1) if correction in ("both", "second") else 1.0
    if epsilon_place == "inside the root":
        root = (second / two + epsilon).sqrt()
    elif epsilon_place == "before the correction":
        root = (second.sqrt() + epsilon) / two**0.5
    else:
        root = (second / two).sqrt() + epsilon
    rate = _rate(learning_rates, count + ahead)
    change = -rate * (first / one) / root
    if decay == "decoupled":
        change = change - rate * weight_decay * parameter
    elif decay == "not scaled":
        change = change - weight_decay * parameter
    return change


def sgd_step(
    arrays: Arrays,
    *,
    learning_rates: Sequence[float],
    count: int = 0,
    ahead: int = 0,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    dampens_first: bool = False,
    weight_decay: float = 0.0,
    decay: str = "coupled",
    clip: float | None = None,
    clipped: str = "by the global norm",
    clip_epsilon: float = 0.0,
) -> torch.Tensor:
    """Computes the change of a parameter in a step of SGD; arguments as in `adam_step`.

    Args:
      arrays: parameter, gradient and norm; after the first step also velocity, that before it.
      momentum: weight of the velocity before the step.
      nesterov: whether the step looks ahead along the velocity.
      dampening: part of the gradient that the velocity leaves out.
      dampens_first: whether the first step, which has no velocity before it, leaves it out, too.
    """
    parameter, gradient = arrays["parameter"], arrays["gradient"]
    gradient = _clipped(gradient, arrays, clip, clipped, clip_epsilon)
    if decay == "coupled":
        gradient = gradient + weight_decay * parameter
    velocity = gradient
    if count or dampens_first:
        velocity = (1 - dampening) * gradient
    if count and momentum:
        velocity = velocity + momentum * arrays["velocity"]
    change = gradient + momentum * velocity if nesterov else velocity
    return -_rate(learning_rates, count + ahead) * change


def average_step(
    arrays: Arrays, *, decay: float, count: int = 0, grows: bool = True, updated: bool = True
) -> torch.Tensor:
    """Computes the change of a moving average of the weights after a step.

    Args:
      arrays: average, that before the step, and parameter, that after it.
      decay: weight of the average so far, once many steps are taken.
      count: number of steps before this one.
      grows: whether the decay is at most (1 + count) / (10 + count), in float32 as it is on the
        device.
      updated: whether the average changes at all.
    """
    limit = np.float32(1 + count) / np.float32(10 + count)
    share = float(1 - np.minimum(np.float32(decay), limit)) if grows else 1 - decay
    return (arrays["parameter"] - arrays["average"]) * (share if updated else 0.0)


def _rate(learning_rates: Sequence[float], step: int) -> float:
    if step < 0:
        raise IndexError("no step before the first one")
    return learning_rates[step]


def _clipped(
    gradient: torch.Tensor, arrays: Arrays, clip: float | None, how: str, epsilon: float
) -> torch.Tensor:
    if clip is None or how == "not":
        return gradient
    if how == "by value":
        return gradient.clamp(-clip, clip)
    norm = arrays["norm"] if how == "by the global norm" else gradient.norm()
    return gradient * (clip / (norm + epsilon)).clamp(max=1.0)


RATES = (
    Cause("ahead", 1, "the learning rate of the next step (off by one)"),
    Cause("ahead", -1, "the learning rate of the step before (off by one)"),
)
CLIPS = (
    Cause("clipped", "not", "gradients not clipped"),
    Cause("clipped", "by each norm", "each gradient clipped by its own norm"),
    Cause("clipped", "by value", "gradients clipped by value"),
    Cause("clip_epsilon", 1e-6, "1e-06 added to the norm before clipping"),
    Cause("clip_epsilon", 0.0, "nothing added to the norm before clipping"),
    *(
        Cause("clip", limit, f"gradients clipped to norm {limit:g}")
        for limit in (1.0, 0.5, 5.0, 10.0)
    ),
)
DECAYS = (
    Cause("decay", "coupled", "weight decay added to the gradient (not decoupled)"),
    Cause("decay", "decoupled", "decoupled weight decay"),
    Cause("decay", "none", "no weight decay"),
    Cause("decay", "not scaled", "weight decay not scaled by the learning rate"),
)
RUNNING_STATISTICS = Definition(
    running_statistics,
    (
        Cause("variance", "biased", "the biased variance in the running one"),
        *(
            Cause("momentum", value, f"momentum {value:g}")
            for value in (0.1, 0.01, 0.9, 0.99, 0.001, 0.999, 0.05)
        ),
        Cause("updated", False, "running statistics not updated"),
    ),
)
LOSS = Definition(
    loss,
    (
        Cause("reduction", "sum", "cross-entropy summed instead of averaged over voxels"),
        *(Cause("smoothing", s, f"label smoothing {s:g}") for s in (0.1, 0.05, 0.2, 0.01)),
        Cause("dice", "over the batch", "Dice over the whole batch instead of each volume"),
        Cause("dice", "squared", "squares in Dice's denominator"),
        Cause("background", False, "the background left out of Dice"),
        *(
            Cause("epsilon", value, f"Dice's epsilon {value:g}")
            for value in (1e-5, 1.0, 1e-6, 1e-8)
        ),
        Cause("parts", "cross-entropy", "cross-entropy only"),
        Cause("parts", "dice", "Dice only"),
        Cause("parts", "half", "the mean instead of the sum of Dice and cross-entropy"),
    ),
)
ADAM_STEP = Definition(
    adam_step,
    (
        *DECAYS,
        Cause("correction", "neither", "no bias correction"),
        Cause("correction", "first", "no bias correction of the second moment"),
        Cause("correction", "second", "no bias correction of the first moment"),
        Cause("epsilon_place", "inside the root", "epsilon inside the root"),
        Cause("epsilon_place", "before the correction", "epsilon added before the bias correction"),
        *(
            Cause("epsilon", value, f"epsilon {value:g}")
            for value in (1e-8, 1e-6, 1e-7, 1e-5, 1e-4)
        ),
        *(
            Cause("betas", (one, two), f"betas {one:g} and {two:g}")
            for one, two in (
                (0.9, 0.999),
                (0.9, 0.99),
                (0.9, 0.98),
                (0.9, 0.95),
                (0.95, 0.999),
                (0.8, 0.999),
                (0.5, 0.999),
            )
        ),
        *RATES,
        *CLIPS,
    ),
)
SGD_STEP = Definition(
    sgd_step,
    (
        Cause("decay", "none", "no weight decay"),
        *RATES,
        *CLIPS,
        Cause("nesterov", True, "Nesterov's momentum"),
        *(Cause("momentum", value, f"momentum {value:g}") for value in (0.0, 0.9, 0.99, 0.95, 0.5)),
        *(Cause("dampening", value, f"dampening {value:g}") for value in (0.9, 0.5, 0.1)),
        Cause("dampens_first", True, "dampening in the first step"),
    ),
)
AVERAGE_STEP = Definition(
    average_step,
    (
        Cause("updated", False, "the average is not updated"),
        Cause("grows", False, "a decay that does not grow from the first step on"),
        *(Cause("decay", value, f"decay {value:g}") for value in (0.9, 0.99, 0.999, 0.9999)),
    ),
)
