"""Climbs the whole ladder in float64 and its forward rungs in float32."""

import jax
import pytest

from parity_tests import configs
from parity_tests.climb import torch_threads
from parity_tests.half_precision import half_precision_rows
from parity_tests.ladder import RUNGS
from parity_tests.planted_errors import PLANTED_ERRORS
from parity_tests.small import small, tiny
from parity_tests.trajectory import TRAININGS, Training, trajectory_rows
from unetr_flax import UNETRConfig
from unetr_flax.parity.rows import assert_rows
from unetr_flax.parity.twins import make_twins, precise

CASES = [(name, rung) for name in configs.ALL for rung in RUNGS if RUNGS[rung].reduce is None]

# The models of whole trainings and volumes. MONAI's have a fixed size that takes minutes.
REDUCED = {
    "reference": UNETRConfig.reference((32, 16, 48), 2, 3),
    "monai": UNETRConfig.monai((32, 16, 48), 2, 3),
}


def climbed(rung, cfg, dtype):
    """Makes twins, smaller ones if the rung wants so, and compares them."""
    reduce = RUNGS[rung].reduce
    with precise(), torch_threads(1):
        return RUNGS[rung].compare(make_twins(cfg if reduce is None else reduce(cfg), dtype))


@pytest.mark.parametrize(("name", "rung"), CASES)
def test_float64(name, rung):
    assert_rows(climbed(rung, configs.ALL[name], "float64"))


@pytest.mark.parametrize("rung", ["activations", "masked activations"])
@pytest.mark.parametrize("name", configs.ALL)
def test_float32(name, rung):
    assert_rows(climbed(rung, configs.ALL[name], "float32"))


def test_steps_of_a_tiny_model():
    with precise(), torch_threads(1):
        twins = make_twins(tiny(REDUCED["reference"]), "float64")
        assert_rows(trajectory_rows(twins, TRAININGS[0], steps=10))


@pytest.mark.slow
@pytest.mark.parametrize("family", REDUCED)
def test_a_hundred_steps(family):
    rows = climbed("trajectory", REDUCED[family], "float64")
    assert {row.rung for row in rows} == {
        "100 steps of adamw, clipped, averaged",
        "100 steps of sgd, 2 parts accumulated",
    }
    assert any(row.name.startswith("average: ") for row in rows)
    assert_rows(rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", REDUCED)
def test_a_volume_s_logits_and_scores(family):
    assert_rows(climbed("volume to score", REDUCED[family], "float64"))


def test_a_volume_of_a_tiny_model():
    with precise(), torch_threads(1):
        rows = RUNGS["volume to score"].compare(
            make_twins(tiny(REDUCED["reference"]), "float64", batch=1)
        )
    assert [row.rung for row in rows] == ["sliding window"] * 3 + ["loss"] * 4 + ["scores"] * 2
    assert_rows(rows)


# In evaluation, norms promote half precision with their parameters.
@jax.numpy_dtype_promotion("standard")
@pytest.mark.slow
@pytest.mark.parametrize("family", REDUCED)
def test_half_precision(family):
    rows = climbed("half precision", REDUCED[family], "float64")
    assert len(rows) == 16
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


@jax.numpy_dtype_promotion("standard")
def test_half_precision_of_a_tiny_model():
    with precise(), torch_threads(1):
        twins = make_twins(tiny(REDUCED["reference"]), "float64")
        rows = half_precision_rows(twins, images=2, dtypes=("float16",))
    assert [row.name for row in rows] == [
        "logits",
        *(f"skip feature z{layer}" for layer in range(1, 5)),
        "gradients, encoder",
        "gradients, decoder",
        "gradients, image",
    ]
    # The Flax model rounds features to float16, of which few blocks lose little more.
    assert rows[0].ok
    assert all(1e-4 < row.ours < 2 * row.theirs < 0.5 for row in rows)


def test_reduced_models_keep_family_and_options():
    for cfg in REDUCED.values():
        for reduced in (small(cfg), tiny(cfg)):
            same = ("family", "in_channels", "out_channels", "num_heads", "block", "norm")
            assert all(getattr(reduced, name) == getattr(cfg, name) for name in same)


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("error", PLANTED_ERRORS, ids=lambda error: error.name)
def test_planted_error_is_caught(error):
    with error.plant():
        if error.rung == "trajectory":
            with precise(), torch_threads(1):
                twins = make_twins(tiny(REDUCED["reference"]), "float64")
                rows = trajectory_rows(twins, Training("adamw"), steps=3)
        else:
            rows = climbed(error.rung, configs.SMALL, "float64")
    assert max(row.relative / row.tolerance for row in rows) >= 100
