"""Norms: of tokens (layer norm) and of channels (batch, instance and group norm)."""

import torch

from unetr_flax.parity.causes.activation import ACTIVATIONS, activate
from unetr_flax.parity.causes.explain import Arrays, Cause, Definition

EPSILONS = tuple(
    Cause("epsilon", value, f"epsilon {value:g}") for value in (1e-6, 1e-5, 1e-12, 1e-8, 1e-3)
)
DETAILS = (
    Cause("variance", "unbiased", "the unbiased variance"),
    Cause("variance", "second moment", "the mean not subtracted"),
    Cause("epsilon_place", "deviation", "epsilon added to the deviation, not to the variance"),
    Cause("affine", "neither", "scale and bias dropped"),
    Cause("affine", "no bias", "bias dropped"),
    Cause("affine", "no scale", "scale dropped"),
    Cause("affine", "1 + scale", "scale counted from one"),
)


def layer_norm(
    arrays: Arrays,
    *,
    epsilon: float,
    variance: str = "biased",
    epsilon_place: str = "variance",
    affine: str = "both",
    axis: int = -1,
    applied: bool = True,
) -> torch.Tensor:
    """Normalizes tokens x [B, N, E] over E."""
    x = arrays["x"]
    if not applied:
        return x
    return _normalized(
        x, arrays, (axis,), (1,) * (x.ndim - 1), epsilon, variance, epsilon_place, affine
    )


def channel_norm(
    arrays: Arrays,
    *,
    norm: str,
    groups: int | None,
    epsilon: float,
    activation: str,
    statistics: str = "own",
    variance: str = "biased",
    epsilon_place: str = "variance",
    affine: str = "both",
    applied: bool = True,
) -> torch.Tensor:
    """Normalizes x [B, C, *spatial] and applies the activation that follows.

    Args:
      arrays: x, and scale, bias, mean and var [C] where the norm has them.
      norm: "batch", "instance" or "group".
      groups: channel groups of a group norm.
      epsilon: number added to the variance.
      activation: the activation that follows, "none" for none.
      statistics: "own" (the batch's or volume's), "running" or "initial" (mean 0, variance 1).
      variance: "biased", "unbiased", or "second moment".
      epsilon_place: "variance" or "deviation".
      affine: "both", "neither", "no bias", "no scale", "1 + scale".
      applied: whether there is a norm at all.
    """
    x = arrays["x"]
    if not applied:
        return activate(x, activation)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    spatial = tuple(range(2, x.ndim))
    if norm == "batch" and statistics != "own":
        mean, var = (arrays[n].reshape(shape) for n in ("mean", "var"))
        if statistics == "initial":
            mean, var = torch.zeros_like(mean), torch.ones_like(var)
        y = _scaled((x - mean) / _deviation(var, epsilon, epsilon_place), arrays, shape, affine)
    elif norm == "group":
        if groups is None or x.shape[1] % groups:
            raise ValueError("groups must divide the channels")
        grouped = x.reshape(len(x), groups, -1)
        plain = _normalized(grouped, {}, (2,), (), epsilon, variance, epsilon_place, "neither")
        y = _scaled(plain.reshape(x.shape), arrays, shape, affine)
    else:
        axes = (0, *spatial) if norm == "batch" else spatial
        y = _normalized(x, arrays, axes, shape[:1], epsilon, variance, epsilon_place, affine)
    return activate(y, activation)


def _normalized(x, arrays, axes, leading, epsilon, variance, place, affine) -> torch.Tensor:
    mean = x.mean(axes, keepdim=True)
    if variance == "second moment":
        mean = torch.zeros_like(mean)
    var = ((x - mean) ** 2).mean(axes, keepdim=True)
    if variance == "unbiased":
        count = x.numel() // mean.numel()
        var = var * count / (count - 1)
    shape = (*leading, -1) + (1,) * (x.ndim - 1 - len(leading))
    return _scaled((x - mean) / _deviation(var, epsilon, place), arrays, shape, affine)


def _deviation(var: torch.Tensor, epsilon: float, place: str) -> torch.Tensor:
    return (var + epsilon).sqrt() if place == "variance" else var.sqrt() + epsilon


def _scaled(x: torch.Tensor, arrays: Arrays, shape, affine: str) -> torch.Tensor:
    if affine != "neither" and affine != "no scale" and "scale" in arrays:
        scale = arrays["scale"].reshape(shape)
        x = x * (1 + scale if affine == "1 + scale" else scale)
    if affine != "neither" and affine != "no bias" and "bias" in arrays:
        x = x + arrays["bias"].reshape(shape)
    return x


LAYER_NORM = Definition(
    layer_norm,
    (
        *EPSILONS,
        *DETAILS,
        Cause("axis", 1, "normalized over the tokens instead of their features"),
        Cause("applied", False, "the norm left out"),
    ),
)
CHANNEL_NORM = Definition(
    channel_norm,
    (
        *EPSILONS,
        *ACTIVATIONS,
        Cause(
            "statistics",
            "own",
            "the batch's own statistics (training mode left on)",
            instead="the batch's own ones",
        ),
        Cause(
            "statistics",
            "running",
            "the running statistics (evaluation mode)",
            instead="the running ones",
        ),
        Cause("statistics", "initial", "initial running statistics (the checkpoint's are stale)"),
        *DETAILS,
        Cause("norm", "instance", "instance norm"),
        Cause("norm", "batch", "batch norm"),
        Cause("norm", "group", "group norm"),
        Cause("groups", 1, "statistics over all channels"),
        *(Cause("groups", n, f"{n} groups") for n in (2, 4, 8, 16, 32)),
        Cause("applied", False, "the norm left out"),
    ),
)
