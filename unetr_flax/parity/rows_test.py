import itertools

import numpy as np
import pytest

from unetr_flax.parity.rows import compare_arrays

SHAPES = [(5,), (2, 3, 4), (1, 3, 4, 5), (2, 3, 4, 2, 3)]


def corners(shape):
    return list(itertools.product(*({0, n - 1} for n in shape)))


def arrays(shape):
    """Makes two equal arrays, one of them with the channels last in memory."""
    theirs = np.random.default_rng(0).uniform(-1, 1, shape)
    if theirs.ndim == 1:
        return theirs.copy(), theirs
    return np.moveaxis(np.moveaxis(theirs, 1, -1).copy(), -1, 1), theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_difference_is_found_wherever_it_is(shape):
    for corner in corners(shape):
        ours, theirs = arrays(shape)
        theirs[corner] = -4.0
        ours[corner] = -4.5
        row = compare_arrays("rung", "name", ours, theirs)
        assert (row.max_abs, row.relative, row.ok) == (0.5, 0.125, False)
        assert row.ulps == 0.5 / np.spacing(4.0)
        assert compare_arrays("rung", "name", theirs, theirs).max_abs == 0
        assert compare_arrays("rung", "name", ours, theirs, scale=2.0).relative == 0.25


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_a_number_never_agrees(shape, both):
    for corner in corners(shape):
        ours, theirs = arrays(shape)
        ours[corner] = np.nan
        if both:
            theirs[corner] = np.nan
        row = compare_arrays("rung", "name", ours, theirs)
        assert np.isnan(row.max_abs)
        assert not row.ok
