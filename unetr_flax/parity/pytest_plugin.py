"""The pytest fixture `parity`; `pytest_plugins = ["unetr_flax.parity.pytest_plugin"]` adds it."""

from collections.abc import Callable, Iterator

import pytest

from unetr_flax.parity.own_port import assert_parity
from unetr_flax.parity.twins import precise


@pytest.fixture
def parity() -> Iterator[Callable[..., None]]:
    """Gives `assert_parity`, with float64 and full float32 products in JAX during the test."""
    with precise():
        yield assert_parity
