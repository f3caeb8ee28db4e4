"""Entries of the data are found again from the values that they make, for each kind of module."""

import itertools

import numpy as np
import pytest
import torch

from unetr_flax.parity.causes import DEFINITIONS
from unetr_flax.parity.causes.explain import Cause, Definition, read

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def cube(channels):
    return normal(2, channels, 4, 4, 4)


TOKENS = normal(2, 8, 12)
CHANNELS = {name: normal(16) for name in ("scale", "bias", "mean")} | {"var": 0.5 + normal(16) ** 2}
LABELS = torch.arange(2 * 64).reshape(2, 4, 4, 4) % 3
STREAMS = {n: normal(2, 8, 12) for n in ("x", "attention", "mlp", "middle", "own middle", "normed")}

# Arrays and right settings of each kind; several where a cause needs others to show.
EXAMPLES = {
    "image": [({"x": 10 * cube(3)}, {}), ({"x": normal(2, 3, 4, 4)}, {})],
    "patches": [
        ({"x": normal(2, 3, 8, 8, 8), "weight": normal(6, 3, 4, 4, 4), "bias": normal(6)}, {}),
        ({"x": normal(2, 3, 8, 8), "weight": normal(6, 3, 4, 4), "bias": normal(6)}, {}),
    ],
    "positions": [
        (
            {"x": normal(2, 12, 2, 2, 2), "positions": normal(1, 8, 12), "post-norm": TOKENS},
            {},
        ),
        ({"x": normal(2, 12, 3, 4), "positions": normal(1, 12, 12)}, {}),
        (
            {
                "x": normal(2, 12, 3, 4, 5),
                "positions": normal(1, 8, 12),
                "stored grid": torch.zeros(2, 2, 2),
            },
            {"resize": "linear"},
        ),
        (
            {
                "x": normal(2, 12, 3, 4, 5),
                "positions": normal(1, 8, 12),
                "stored grid": torch.zeros(2, 2, 2),
            },
            {"resize": "nearest"},
        ),
    ],
    "layer_norm": [
        ({"x": TOKENS, "scale": normal(12), "bias": normal(12)}, {"epsilon": epsilon})
        for epsilon in (1e-5, 1e-4)
    ],
    "direct": [({"x": TOKENS, "unnormed": normal(2, 8, 12), "post-norm": normal(2, 8, 12)}, {})],
    "qkv": [
        (
            {"x": TOKENS, "weight": normal(36, 12), "bias": normal(36)},
            {"heads": 3, "order": order},
        )
        for order in ("(qkv h d)", "(h d qkv)")
    ],
    "attention": [
        (
            {"qkv": normal(2, 8, 3, 3, 4), "dropped": normal(2, 3, 8, 8)},
            {"scale": "head", "mask": "ignored", "order": order, "right_order": order},
        )
        for order in ("(qkv h d)", "(h d qkv)")
    ]
    + [
        (
            {"qkv": normal(2, 8, 3, 3, 4), "mask": normal(2, 3, 8, 8) > -1},
            {"scale": "embedding", "mask": "applied", "order": order, "right_order": order},
        )
        for order in ("(qkv h d)",)
    ],
    "projection": [({"x": TOKENS, "weight": normal(12, 12), "bias": normal(12)}, {"heads": 3})],
    "middle": [(STREAMS, {})],
    "linear": [({"x": TOKENS, "weight": normal(12, 12), "bias": normal(12)}, {})],
    "activation": [({"x": TOKENS}, {"activation": name}) for name in ("gelu", "relu")],
    "stream": [({**STREAMS, "middle normed": normal(2, 8, 12), "post-norm": TOKENS}, {})],
    "features": [
        (
            {f"after {n}": normal(2, 8, 12) for n in range(1, 33)}
            | {"grid": torch.zeros(2, 2, 2), "normed": TOKENS, "normed after 3": normal(2, 8, 12)}
            | {"scale": normal(12), "bias": normal(12)},
            {"layer": 3, "norm": norm},
        )
        for norm in ("none", "final")
    ]
    + [
        (
            {f"after {n}": normal(2, 12, 12) for n in (1, 3)} | {"grid": torch.zeros(3, 4)},
            {"layer": 1, "norm": "none"},
        )
    ],
    "convolution": [
        ({"x": cube(4), "weight": normal(4, 4, 3, 3, 3), "bias": normal(4)}, {}),
        ({"x": normal(2, 4, 6, 6), "weight": normal(4, 4, 3, 3), "bias": normal(4)}, {}),
    ],
    "deconvolution": [
        ({"x": cube(4), "weight": normal(4, 4, 2, 2, 2), "bias": normal(4)}, right)
        for right in ({}, {"upsample": "linear"})
    ]
    + [({"x": normal(2, 4, 6, 6), "weight": normal(4, 4, 2, 2), "bias": normal(4)}, {})],
    "channel_norm": [
        (
            {"x": cube(16), **CHANNELS},
            {"norm": norm, "groups": 4, "epsilon": 1e-5, "activation": "none", **statistics},
        )
        for norm, statistics in (
            ("batch", {"statistics": "running"}),
            ("batch", {}),
            ("instance", {}),
        )
    ]
    + [
        (
            {"x": normal(2, 64, 2, 2), **{k: v.repeat(4) for k, v in CHANNELS.items()}},
            {"norm": "group", "groups": 64, "epsilon": 1e-4, "activation": "relu"},
        )
    ],
    "residual_end": [
        (
            {"y": cube(4), "x": cube(4), "block input": cube(4)},
            {"activation": name},
        )
        for name in ("relu", "leaky relu 0.01")
    ],
    "concatenation": [
        ({"skip": cube(4), "up": cube(4)}, {"order": order}) for order in ("skip first", "up first")
    ],
    "logits": [({"x": cube(3)}, {"activation": "none"})],
    "value": [({"x": normal(*shape)}, {}) for shape in ((4,) * 2, (4,) * 3, (4,) * 4, (4,) * 5)],
    "gradient": [({"x": normal(*shape)}, {}) for shape in ((4,) * 2, (4,) * 3, (4,) * 4, (4,) * 5)],
    "running_statistics": [
        ({"x": cube(16), "mean": CHANNELS["mean"], "var": CHANNELS["var"]}, {"momentum": momentum})
        for momentum in (0.1, 0.2)
    ],
    "loss": [({"logits": cube(3), "labels": LABELS}, {"epsilon": e}) for e in (1e-5, 1e-4)],
    "adam_step": [
        (
            {
                "parameter": TOKENS,
                "gradient": 1e-2 * normal(2, 8, 12),
                "norm": torch.tensor(30.0),
                "first": 1e-2 * normal(2, 8, 12),
                "second": 1e-4 * normal(2, 8, 12) ** 2,
            },
            {
                "learning_rates": (0.1, 0.3, 0.2, 0.15),
                "count": count,
                "betas": betas,
                "weight_decay": 0.05,
                "clip": clip,
                "epsilon": 1e-3,
                "decay": decay,
                "clip_epsilon": 1e-6 * (decay == "coupled"),
            },
        )
        for clip, decay, count, betas in (
            (1e-3, "decoupled", 0, (0.9, 0.999)),
            (1e-3, "coupled", 2, (0.7, 0.97)),
            (20.0, "decoupled", 2, (0.9, 0.999)),
            (20.0, "coupled", 0, (0.9, 0.999)),
        )
    ],
    "sgd_step": [
        (
            {
                "parameter": TOKENS,
                "gradient": normal(2, 8, 12),
                "norm": torch.tensor(30.0),
                "velocity": normal(2, 8, 12),
            },
            {
                "learning_rates": (0.1, 0.3, 0.2, 0.15),
                "count": count,
                "weight_decay": 0.05,
                "momentum": momentum,
                "dampening": 0.2,
                "clip": 0.1,
                "clip_epsilon": epsilon,
            },
        )
        for epsilon, count, momentum in ((0.0, 0, 0.9), (1e-6, 2, 0.9), (0.0, 2, 0.7))
    ],
    "average_step": [
        (
            {"average": TOKENS, "parameter": normal(2, 8, 12)},
            {"decay": 0.995, "count": count},
        )
        for count in (3, 20_000)
    ],
}


def entries(kind):
    """Returns a kind's entries; of many that differ in a number or an order only, four."""
    chosen = []
    for _, group in itertools.groupby(DEFINITIONS[kind].causes, key=lambda cause: cause.setting):
        group = list(group)
        chosen += group if len(group) < 8 else group[:: len(group) // 4]
    return chosen


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_causes_are_found_from_their_values(kind):
    for cause in entries(kind):
        check(DEFINITIONS[kind], kind, cause)


def check(definition: Definition, kind, cause):
    told = []
    for arrays, right in EXAMPLES[kind]:
        if right.get(cause.setting) == cause.value:
            continue
        try:
            wide = {name: array.double() for name, array in arrays.items()}
            value = definition.compute(wide, **{**right, cause.setting: cause.value})
        except (LookupError, ValueError, RuntimeError):
            continue
        if value.shape == (base := definition.compute(wide, **right)).shape:
            same = np.allclose(value, base, rtol=1e-9, atol=0)
            reading = read(definition, arrays, right, value, "float64")
            assert reading is not None
            assert reading.difference <= 1e-10
            told.append((reading.text, same))
    # Other entries may make the same value in one example, but not in all of them.
    assert any(cause.text in text for text, _ in told), (cause, told)


def test_nothing_is_explained_by_force():
    arrays, right = EXAMPLES["linear"][0]
    base = DEFINITIONS["linear"].compute(arrays, **right)
    assert read(DEFINITIONS["linear"], arrays, right, base, "float64").text == ""
    assert read(DEFINITIONS["linear"], arrays, right, base + normal(2, 8, 12), "float64") is None
    broken = base.clone()
    broken[0, 0, 0] = float("nan")
    assert read(DEFINITIONS["linear"], arrays, right, broken, "float64") is None


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("dropout of rate 0.25", lambda y: torch.where(normal(2, 8, 12) > 0, y / 0.75, 0.0)),
        ("computed in float32 instead of float64", lambda y: y.float().double()),
        ("computed in bfloat16 instead of float64", lambda y: y.bfloat16().double()),
        ("multiplied by 0.5", lambda y: 0.5 * y),
    ],
)
def test_patterns_of_any_module(text, change):
    arrays, right = EXAMPLES["linear"][0]
    value = change(DEFINITIONS["linear"].compute(arrays, **right))
    assert text in read(DEFINITIONS["linear"], arrays, right, value, "float64").text


def test_two_causes_in_one_module_and_the_words_for_them():
    definition = DEFINITIONS["layer_norm"]
    arrays, right = EXAMPLES["layer_norm"][0]
    value = definition.compute(arrays, epsilon=1e-3, affine="no bias")
    told = read(definition, arrays, right, value, "float64").text
    assert told == "epsilon 0.001 instead of 1e-05 and bias dropped"


def test_words_of_a_right_value_can_differ():
    definition = Definition(
        lambda arrays, *, sign: sign * arrays["x"],
        (Cause("sign", -1, "the sign turned"), Cause("sign", 1, "the sign kept", instead="as is")),
    )
    x = normal(3)
    told = read(definition, {"x": x}, {"sign": 1}, -x, "float64").text
    assert told == "the sign turned instead of as is"
