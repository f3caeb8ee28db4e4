import itertools

import numpy as np
import pytest

from unetr_flax.parity.rows import compare_arrays, worst_of

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
        beside = compare_arrays("rung", "name", ours, theirs, beside=("other", np.array([1.0, -2])))
        assert (beside.relative, beside.relative_to) == (0.25, "other")


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


@pytest.mark.parametrize("scale", [0.0, np.nan])
def test_nothing_but_zero_agrees_with_zero(scale):
    zeros = np.zeros((2, 3))
    assert compare_arrays("rung", "zeros", zeros, zeros).ok
    for value in (np.nan, np.inf, 1e-300):
        assert not compare_arrays("rung", "name", zeros + value, zeros).ok
    beside = ("other", np.full(2, scale))
    assert not compare_arrays("rung", "name", zeros + np.nan, zeros, beside=beside).ok


def test_worst_row_is_the_one_that_is_not_a_number():
    exact = np.ones(2)
    rows = [compare_arrays("rung", str(v), exact * v, exact) for v in (1, np.nan, 3)]
    assert worst_of(rows).name == "nan"
    assert worst_of(rows[::2]).name == "3"
    # A difference of 1e-6 is far in float64 and near in float32.
    narrow = exact.astype("float32")
    near = compare_arrays("rung", "near", narrow + np.float32(1e-6), narrow)
    far = compare_arrays("rung", "far", exact + 1e-8, exact)
    assert worst_of([near, far, near]).name == "far"
