"""Climbs the whole ladder in float64 and its forward rungs in float32."""

import pytest

from parity_tests import configs
from parity_tests.ladder import RUNGS
from parity_tests.planted_errors import PLANTED_ERRORS
from unetr_flax.parity.rows import assert_rows
from unetr_flax.parity.twins import make_twins, precise

# Trajectories take a minute each, so by default there is that of the small model.
CASES = [
    pytest.param(name, rung, marks=[pytest.mark.slow] * (rung == "trajectory" and name != "small"))
    for name in configs.ALL
    for rung in RUNGS
]


@pytest.mark.parametrize(("name", "rung"), CASES)
def test_float64(name, rung):
    with precise():
        assert_rows(RUNGS[rung].compare(make_twins(configs.ALL[name], "float64")))


@pytest.mark.parametrize("rung", ["activations", "masked activations"])
@pytest.mark.parametrize("name", configs.ALL)
def test_float32(name, rung):
    with precise():
        assert_rows(RUNGS[rung].compare(make_twins(configs.ALL[name], "float32")))


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("error", PLANTED_ERRORS, ids=lambda error: error.name)
def test_planted_error_is_caught(error):
    with precise(), error.plant():
        rows = RUNGS[error.rung].compare(make_twins(configs.SMALL, "float64"))
    assert max(row.relative / row.tolerance for row in rows) >= 100
