"""The diagnosis names planted errors: some here, all of them in the slow test."""

import dataclasses

import jax
import numpy as np
import pytest

from parity_tests import causes
from parity_tests.planted_errors import PLANTED_ERRORS
from parity_tests.torch_errors import MONAI, TORCH_ERRORS
from unetr_flax.parity.causes.explain import EXPLAINED
from unetr_flax.parity.diagnose import diagnose, told
from unetr_flax.parity.rows import compare_arrays
from unetr_flax.parity.twins import make_twins, precise

# Errors in one small model, whose program is compiled once; a few are in the default tests.
MONAI_ERRORS = [error for error in TORCH_ERRORS if error.cfg == MONAI]
FEW = (
    "final norm missing",
    "features one block early",
    "InstanceNorm epsilon 1e-6",
    "LeakyReLU of slope 0.2",
    "concatenation in the other order",
    "attention scaled by the embedding's width",
)


@pytest.fixture(scope="module")
def twins():
    with precise():
        return make_twins(MONAI, "float64", batch=1)


@pytest.mark.parametrize(
    "error", [e for e in MONAI_ERRORS if e.name in FEW], ids=lambda error: error.name
)
def test_error_in_the_torch_model_is_named(error, twins):
    findings = causes.torch_findings(error, twins)
    assert error.is_named(findings), told(findings)


def test_models_that_agree_are_not_accused(twins):
    with precise():
        assert diagnose(twins) == []


def test_float32_rounding_that_adds_up_is_told_as_such(twins):
    with precise():
        short = make_twins(MONAI, "float32", batch=1)
    one = np.ones(3)
    rows = [
        compare_arrays("logits", "logits", one, one + 3e-15),
        dataclasses.replace(
            compare_arrays("logits", "logits", one.astype("f"), one.astype("f")), relative=2e-5
        ),
    ]
    lines = causes.explain_rows(rows, {"float64": twins, "float32": short})
    assert lines == [
        "accumulated float32 rounding: logits differs by 2.0e-05, but every module holds alone on "
        "equal inputs, and in float64 all agree within 3.1e-15"
    ]


def test_every_planted_error_has_a_cause_to_be_named():
    assert {error.name for error in PLANTED_ERRORS} == causes.NAMED.keys()
    assert len(TORCH_ERRORS) >= 25
    assert EXPLAINED["float64"] == 1e-10


@pytest.mark.slow
def test_confusion_table():
    wrong = [case for case in causes.cases() if not case.right]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", causes.healthy_configs())
def test_no_false_accusation(name):
    jax.clear_caches()
    assert causes.healthy_case(name, causes.healthy_configs()[name]).right


@pytest.mark.slow
def test_large_models_are_diagnosed_part_by_part(monkeypatch):
    monkeypatch.setattr("unetr_flax.parity.places.LARGE", 1)
    with precise():
        twins = make_twins(MONAI, "float64", batch=1)
        assert diagnose(twins) == []
    for error in MONAI_ERRORS:
        findings = causes.torch_findings(error, twins)
        assert error.is_named(findings), told(findings)
