"""The library must not lean on implicit promotion of dtypes: float64 parity would not survive."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield
