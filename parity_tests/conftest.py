import jax
import pytest


@pytest.fixture
def traced_anew():
    """Clears JAX's caches before and after a test that plants an error.

    Programs with `jit_blocks` share the traces of equal blocks. Without clearing, a planted error
    would not reach blocks that were traced before, and would stay in those traced while it was
    planted.
    """
    jax.clear_caches()
    yield
    jax.clear_caches()
