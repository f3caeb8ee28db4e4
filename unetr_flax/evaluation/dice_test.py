import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax.evaluation.dice import DiceCounts

# Two cases of 2 x 4 voxels, four classes. No voxel has class 3; class 2 is predicted for one voxel
# of the second case, but no voxel is labeled with it.
LABEL = np.array([[[0, 0, 1, 1], [0, 1, 1, 0]], [[0, 0, 0, 0], [0, 1, 1, 1]]], np.uint8)
PREDICTION = np.array([[[0, 1, 1, 1], [0, 0, 1, 0]], [[0, 0, 0, 0], [0, 0, 2, 1]]], np.int32)
PER_CASE = np.array(
    [
        # background: 3 of 4 and 4; class 1: 3 of 4 and 4
        [2 * 3 / 8, 2 * 3 / 8, np.nan, np.nan],
        # background: 5 of 6 and 5; class 1: 1 of 1 and 3; class 2: 0 of 1 and 0
        [2 * 5 / 11, 2 * 1 / 4, 0, np.nan],
    ]
)
PER_CLASS = [(3 / 4 + 10 / 11) / 2, (3 / 4 + 1 / 2) / 2, 0, np.nan]


def counts(cases=slice(None)):
    return DiceCounts.from_labels(PREDICTION[cases], LABEL[cases], 4)


def test_counts():
    state = counts()
    np.testing.assert_array_equal(state.label, [[4, 4, 0, 0], [5, 3, 0, 0]])
    np.testing.assert_array_equal(state.prediction, [[4, 4, 0, 0], [6, 1, 1, 0]])
    np.testing.assert_array_equal(state.intersection, [[3, 3, 0, 0], [5, 1, 0, 0]])


def test_dice_by_hand():
    np.testing.assert_allclose(counts().per_case(), PER_CASE, rtol=1e-15)
    scores = counts().compute()
    np.testing.assert_allclose(scores.per_class, PER_CLASS, rtol=1e-15)
    # The mean is over classes 1 and 2, as no voxel has class 3.
    np.testing.assert_allclose(scores.mean_foreground, (5 / 8 + 0) / 2, rtol=1e-15)


def test_jax_arrays_are_counted_as_numpy_arrays_are():
    state = DiceCounts.from_labels(jnp.asarray(PREDICTION), jnp.asarray(LABEL), 4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(counts()), strict=True):
        assert isinstance(a, np.ndarray)
        np.testing.assert_array_equal(a, b)


def test_voxels_are_counted_in_pieces(monkeypatch):
    monkeypatch.setattr("unetr_flax.evaluation.dice.VOXELS_AT_ONCE", 3)
    state = DiceCounts.from_labels(PREDICTION, LABEL, 4)
    np.testing.assert_array_equal(state.label, [[4, 4, 0, 0], [5, 3, 0, 0]])
    np.testing.assert_array_equal(state.prediction, [[4, 4, 0, 0], [6, 1, 1, 0]])
    np.testing.assert_array_equal(state.intersection, [[3, 3, 0, 0], [5, 1, 0, 0]])


def test_merging_cases_equals_counting_them_together():
    merged = DiceCounts.empty(4).merge(counts([0])).merge(counts([1]))
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(counts()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_cases_of_different_shapes_weigh_the_same():
    large = np.ones((2, 7, 5, 3), np.int64)
    state = counts([0]).merge(DiceCounts.from_labels(large, large, 4))
    np.testing.assert_allclose(state.compute().per_class[1], (3 / 4 + 1 + 1) / 3)


def test_nothing_but_background_has_no_foreground_mean():
    background = np.zeros((2, 3, 4), np.int32)
    scores = DiceCounts.from_labels(background, background, 3).compute()
    np.testing.assert_array_equal(scores.per_class, [1, np.nan, np.nan])
    assert np.isnan(scores.mean_foreground)


def test_no_case_at_all():
    scores = DiceCounts.empty(3).compute()
    np.testing.assert_array_equal(scores.per_class, [np.nan] * 3)
    assert np.isnan(scores.mean_foreground)


def test_one_absent_class_of_a_case_does_not_lower_the_others():
    # Class 1 is in all three cases, class 2 in one of them.
    prediction = np.array([[[0, 1]], [[0, 1]], [[2, 1]]])
    scores = DiceCounts.from_labels(prediction, prediction, 3).compute()
    np.testing.assert_array_equal(scores.per_class, [1, 1, 1])
    assert scores.mean_foreground == 1


def test_counts_beyond_32_bits():
    many = np.array([[3_000_000_000, 2_500_000_000]])
    state = DiceCounts(many, many, many)
    np.testing.assert_array_equal(state.merge(state).compute().per_class, [1, 1])
    assert all(leaf.dtype == np.int64 for leaf in jax.tree.leaves(counts()))


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((2, 4), int), r"prediction: shape \(2, 3\), must be"),
        (np.zeros((2, 3)), np.zeros((2, 3), int), "prediction: float64, must be integers"),
        (
            np.zeros((2, 3), int),
            np.full((2, 3), 4),
            r"label: classes from 4 to 4, must be in",
        ),
        (np.full((2, 3), -1), np.zeros((2, 3), int), "prediction: classes from -1 to -1, must"),
    ],
)
def test_bad_input_is_named(prediction, label, message):
    with pytest.raises(ValueError, match=message):
        DiceCounts.from_labels(prediction, label, 4)
