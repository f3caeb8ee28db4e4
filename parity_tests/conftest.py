import jax
import pytest


@pytest.fixture
def traced_anew():
    """Programs share what was traced of blocks, which a planted error must not find, nor leave."""
    jax.clear_caches()
    yield
    jax.clear_caches()
