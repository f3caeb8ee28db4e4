import jax
import pytest


@pytest.fixture
def traced_anew():
    """The model's blocks keep what was traced, which a planted error must not find, nor leave."""
    jax.clear_caches()
    yield
    jax.clear_caches()
