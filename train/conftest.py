"""Settings for the tests of training."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """Keeps prepared cases out of the home folder of whoever runs the tests."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
