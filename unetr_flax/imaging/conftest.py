"""Settings for the tests of imaging."""

import locale

import pytest


@pytest.fixture(autouse=True)
def same_locale():
    """Sets the locale back: SimpleITK's writers of the tests' files change that of the process."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)
