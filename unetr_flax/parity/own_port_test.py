"""Comparison of two functions: the page's example, the fixture, and what is refused."""

import contextlib
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from unetr_flax.parity import Step, assert_parity, compare
from unetr_flax.parity.twins import precise

pytest_plugins = ["unetr_flax.parity.pytest_plugin"]

PAGE = Path(__file__).parents[2] / "docs" / "check_your_port.md"


@pytest.fixture(autouse=True)
def strict_promotion():
    """Allows promotion: the example is written as a user would."""


@pytest.fixture(scope="module")
def page():
    """The names that the page's first two pieces of code define, and what they print."""
    text = PAGE.read_text()
    first, second, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(first, names)
        exec(second, names)
    return names, out.getvalue(), re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]


def test_example_of_the_page_prints_what_the_page_shows(page):
    _, printed, shown = page
    # What is left after a correction is rounding, which may differ.
    digits = re.compile(r"then \S+e-1\d\)")
    assert digits.sub("then rounding)", printed) == digits.sub("then rounding)", shown)


def test_corrected_port_of_the_page_holds(page, parity):
    names, _, _ = page

    def port(tokens):
        norm = names["nn"].LayerNorm(epsilon=1e-5, use_fast_variance=False)
        values = {"normed": norm.apply({"params": names["norm_weights"]}, tokens)}
        for value, source, key in (
            ("expanded", "normed", "expand"),
            ("contracted", "activated", "contract"),
        ):
            weight, bias = (names["weights"][f"{key}.{part}"] for part in ("weight", "bias"))
            values[value] = values[source] @ weight.T + bias
            if value == "expanded":
                values["activated"] = jax.nn.gelu(values[value], approximate=False)
        return values

    parity(port, names["original"], {"tokens": names["tokens"]}, steps=names["steps"])
    with pytest.raises(AssertionError, match=r"explained by epsilon 1e-06 instead of 1e-05 in a"):
        parity(names["port"], names["original"], {"tokens": names["tokens"]}, steps=names["steps"])


X = np.random.default_rng(0).standard_normal((2, 3, 4))


def double(x):
    return {"y": 2 * x, "z": 2 * x + 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda y: 3 * y, "y: differs by 2.0e+00; explained by multiplied by 3 in a"),
        (lambda y: y[..., ::-1], "explained by axis 2 reversed in a"),
        (lambda y: y.astype(np.float32).astype(y.dtype), "computed in float32 instead of float64"),
        (lambda y: y.swapaxes(1, 2), "y: shape (2, 4, 3) in a, (2, 3, 4) in b"),
        (lambda y: y + 1e-3 * y**2, "y: differs by 4.7e-03; no known cause explains it (2x3x4;"),
    ],
)
def test_first_value_without_a_step_is_judged_alone(change, told):
    report = compare(lambda x: {"y": change(2 * x), "z": 2 * x + 5}, double, {"x": X})
    assert not report.ok
    assert told in str(report)
    assert len(report.findings) == 1


@pytest.mark.parametrize("steps", [[], [Step("y", "linear", {"x": "x"}, {"weight": np.eye(4)})]])
def test_first_value_that_differs_is_judged_wherever_it_is(steps):
    def follows(factor):
        return lambda x: {"y": x, "z": factor * x, "later": factor * x + 1}

    report = compare(follows(3.0), follows(1.0), {"x": X}, steps=steps)
    (finding,) = report.findings
    assert str(finding).startswith("z: differs by 2.0e+00; explained by multiplied by 3 in a")


def test_each_value_is_judged_in_its_own_dtype():
    narrow = np.ones(3, np.float32)
    step = Step("y", "linear", {"x": "x"}, {"weight": np.eye(4)})
    report = compare(
        lambda x: {"narrow": narrow, "y": x * (1 + 1e-7)},
        lambda x: {"narrow": narrow, "y": x},
        {"x": X},
        steps=[step],
    )
    (finding,) = report.findings
    assert "explained by multiplied by 1 in a" in str(finding)


@pytest.mark.parametrize("make", [np.copy, torch.from_numpy])
def test_functions_that_change_their_arguments_do_so_alone(make):
    def in_place(x):
        x *= 2
        return {"y": x}

    steps = [Step("y", "activation", {"x": "x"}, right={"activation": "relu"})]
    for pair in ((in_place, lambda x: {"y": x}), (lambda x: {"y": x}, in_place)):
        report = compare(*pair, {"x": make(np.abs(X))}, steps=steps, names=("first", "second"))
        guilty = "first" if pair[0] is in_place else "second"
        (finding,) = report.findings
        assert f"explained by multiplied by 2 in {guilty}" in str(finding)


def test_what_is_no_number_is_told_as_such():
    report = compare(lambda x: {"y": x * np.nan}, lambda x: {"y": 0 * x}, {"x": X})
    assert not report.ok
    assert "y: numbers that are not finite in a; no known cause explains it" in str(report)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X + 1j, "y in a: complex128, must be float64 or float32, or integers"),
        (X.astype(np.float16), "y in a: float16, must be"),
        (torch.ones(2, dtype=torch.bfloat16), "y in a: bfloat16, must be"),
        (jax.numpy.ones(2, jax.numpy.bfloat16), "y in a: bfloat16, must be"),
        (np.zeros((0, 3)), "y in a: shape (0, 3) has no numbers"),
    ],
)
def test_values_that_cannot_be_compared_are_refused(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(lambda: {"y": value}, lambda: {"y": X}, {})
    assert compare(lambda: {"y": np.arange(3)}, lambda: {"y": torch.arange(3)}, {}).ok
    with pytest.raises(ValueError, match=r"b returns ndarray, must return its values by name"):
        compare(lambda: {"y": X}, lambda: X, {})


def test_arrays_of_jax_are_compared_without_a_warning():
    step = Step("y", "activation", {"x": "x"}, right={"activation": "relu"})
    x = jax.numpy.asarray(X)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        report = compare(
            lambda x: {"y": jax.nn.relu(x)}, lambda x: {"y": x}, {"x": x}, steps=[step]
        )
    finally:
        torch.set_warn_always(before)
    (finding,) = report.findings
    assert "explained by no activation instead of ReLU in b" in str(finding)


def test_values_of_one_side_only_are_told():
    report = compare(lambda x: {"y": 2 * x, "extra": x}, double, {"x": X}, names=("mine", "theirs"))
    assert report.notes == ["extra: only mine has it", "z: only theirs has it"]
    assert not report.ok
    assert_parity(double, double, {"x": X})


def test_unusable_steps_are_refused():
    with pytest.raises(ValueError, match=r"no value in common: w; y, z"):
        compare(lambda x: {"w": x}, double, {"x": X})
    with pytest.raises(ValueError, match=r"step 'y', kind 'nonsense': must be one of image, "):
        compare(double, double, {"x": X}, steps=[Step("y", "nonsense", {"x": "x"})])
    for step in (Step("x", "image", {"x": "x"}), Step("w", "image", {"x": "x"})):
        with pytest.raises(ValueError, match=f"step '{step.value}': no value '{step.value}' in"):
            compare(double, double, {"x": X}, steps=[step])
    with pytest.raises(ValueError, match=r"step 'y': there are two"):
        compare(double, double, {"x": X}, steps=2 * [Step("y", "image", {"x": "x"})])
    for kind, inputs, right, told in (
        ("layer_norm", {"x": "x"}, {}, "TypeError: layer_norm"),
        ("linear", {"x": "x"}, {}, "KeyError: 'weight'"),
        ("activation", {"x": "x"}, {"activation": "GELU"}, "KeyError: 'GELU'"),
    ):
        with pytest.raises(ValueError, match=f"step 'y', kind '{kind}': {told}"):
            compare(double, double, {"x": X}, steps=[Step("y", kind, inputs, right=right)])
    with pytest.raises(ValueError, match=r"step 'y': no value 'w' in both functions"):
        compare(double, double, {"x": X}, steps=[Step("y", "linear", {"x": "w"})])


def test_fixture_switches_to_float64(parity):
    assert parity is assert_parity
    assert jax.numpy.ones(1).dtype == np.float64
    with precise():
        parity(double, double, {"x": X})
