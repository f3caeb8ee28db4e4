"""Activations, alone and at the end of a decoder block."""

import torch
import torch.nn.functional as F

from unetr_flax.parity.causes.explain import Arrays, Cause, Definition

FUNCTIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu by sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    **{
        f"leaky relu {slope:g}": lambda x, slope=slope: F.leaky_relu(x, slope)
        for slope in (0.01, 0.1, 0.2, 0.3, 0.25, 0.05, 0.001)
    },
}
WORDS = {
    "none": "no activation",
    "relu": "ReLU",
    "gelu": "the exact GELU",
    "gelu by tanh": "GELU by tanh",
    "gelu by sigmoid": "GELU by sigmoid (the fast GELU)",
    "silu": "SiLU",
    "elu": "ELU",
    "mish": "Mish",
    **{
        name: name.replace("leaky relu", "LeakyReLU of slope")
        for name in FUNCTIONS
        if name.startswith("leaky relu")
    },
}
ACTIVATIONS = tuple(Cause("activation", name, WORDS.get(name, name)) for name in FUNCTIONS)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Applies the activation of this name."""
    return FUNCTIONS[activation](x)


def activation_alone(arrays: Arrays, *, activation: str) -> torch.Tensor:
    """Applies an activation to x."""
    return activate(arrays["x"], activation)


def residual_end(
    arrays: Arrays, *, activation: str, shortcut: str = "before the activation"
) -> torch.Tensor:
    """Ends a residual block: adds the shortcut to y, then applies the activation."""
    y, x = arrays["y"], arrays["x"]
    if shortcut == "missing":
        return activate(y, activation)
    if shortcut == "after the activation":
        return x + activate(y, activation)
    if shortcut == "not projected":
        x = arrays["block input"]
    return activate(y + x, activation)


ACTIVATION = Definition(activation_alone, ACTIVATIONS)
RESIDUAL_END = Definition(
    residual_end,
    (
        *ACTIVATIONS,
        Cause("shortcut", "missing", "the shortcut left out"),
        Cause("shortcut", "after the activation", "the shortcut added after the activation"),
        Cause("shortcut", "not projected", "the shortcut not projected"),
    ),
)
LOGITS = Definition(
    lambda arrays, *, activation: (
        arrays["x"].softmax(1)
        if activation == "softmax"
        else arrays["x"].log_softmax(1)
        if activation == "log softmax"
        else activate(arrays["x"], activation)
    ),
    (
        Cause("activation", "softmax", "a softmax applied to the logits"),
        Cause("activation", "log softmax", "a log-softmax applied to the logits"),
        Cause("activation", "sigmoid", "a sigmoid applied to the logits"),
        Cause("activation", "relu", "a ReLU applied to the logits"),
        Cause("activation", "tanh", "a tanh applied to the logits"),
    ),
)
