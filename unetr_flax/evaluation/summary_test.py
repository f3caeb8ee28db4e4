import numpy as np
import pytest

from unetr_flax.evaluation.bootstrap import bootstrap_means, interval, weighted_means
from unetr_flax.evaluation.scores import Scores
from unetr_flax.evaluation.summary import case_mean, summarize


def scores(dice, hd95=1.0, prediction_ml=1.0, label_ml=1.0):
    return Scores(prediction_ml, label_ml, dice, dice, hd95, dice, hd95)


MISSED = scores(0.0, np.inf, prediction_ml=0.0)
INVENTED = scores(0.0, np.inf, label_ml=0.0)


def test_draws_are_of_whole_cases_and_repeatable():
    values = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    means = bootstrap_means(values, 500, seed=3)
    np.testing.assert_array_equal(means, bootstrap_means(values, 500, seed=3))
    assert (means != bootstrap_means(values, 500, seed=4)).any()
    np.testing.assert_allclose(means[:, 1], 10 * means[:, 0])
    # Every mean is of three draws of 1, 2 and 4, and all ten different ones occur.
    possible = {a + b + c for a in (1, 2, 4) for b in (1, 2, 4) for c in (1, 2, 4)}
    assert set(np.round(3 * means[:, 0]).astype(int)) == possible


def test_draws_do_not_depend_on_how_many_are_in_memory_at_once(monkeypatch):
    values = np.random.default_rng(0).random((6, 3))
    means = bootstrap_means(values, 50, seed=0)
    monkeypatch.setattr("unetr_flax.evaluation.bootstrap._CHUNK", 8 * 6 * 7)
    np.testing.assert_allclose(means, bootstrap_means(values, 50, seed=0), rtol=1e-14)


def test_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).gamma(2.0, 1.0, 40)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = interval(bootstrap_means(values[:, None], 20_000, seed=0))
    np.testing.assert_allclose([low[0], high[0]], [theirs.low, theirs.high], rtol=0.01)


def test_means_of_missing_and_infinite_values():
    values = np.array([[1.0, np.nan], [np.inf, np.nan], [3.0, 5.0], [-np.inf, np.nan]])
    weights = np.array([[1.0, 0, 3, 0], [1, 1, 0, 0], [0, 0, 0, 2]])
    means = weighted_means(values, weights)
    np.testing.assert_array_equal(means, [[2.5, 5.0], [np.inf, np.nan], [-np.inf, np.nan]])


def test_interval_between_finite_and_infinite_means():
    means = np.repeat([[1.0], [2.0], [np.inf]], [20, 940, 40], axis=0)
    assert interval(means) == (2.0, np.inf)
    means[:] = np.nan
    assert np.isnan(interval(means)).all()


def test_a_missed_structure_makes_the_mean_distance_infinite_and_is_counted():
    cases = [{1: scores(0.9, 2.0)}, {1: scores(0.7, 4.0)}, {1: MISSED}, {1: INVENTED}]
    label = summarize(cases, [1], resamples=50).labels[1]
    assert label.cases == 4
    assert label.outcomes == {"found": 2, "empty": 0, "missed": 1, "invented": 1}
    np.testing.assert_allclose(label.estimates["dice"].mean, 0.4)
    assert label.estimates["hd95"].mean == np.inf
    assert label.estimates["hd95"].high == np.inf
    assert label.estimates["hd95"].median == np.inf
    assert label.estimates["relative_volume_difference"].mean == np.inf
    # Two of five are infinite, so the middle one is not.
    label = summarize([*cases, {1: scores(0.9, 3.0)}], [1], resamples=50).labels[1]
    assert label.estimates["hd95"].median == 4.0


@pytest.mark.parametrize("empty", ["agree", "skip"])
def test_an_empty_structure_agrees_or_is_left_out(empty):
    # The first case says nothing about label 2, so neither of its maps has it.
    cases = [{1: scores(0.5)}, {1: Scores.both_empty(), 2: scores(0.8)}]
    summary = summarize(cases, [1, 2, 3], empty=empty, resamples=50)
    numbers = {i: label.cases for i, label in summary.labels.items()}
    means = [label.estimates["dice"].mean for label in summary.labels.values()]
    assert [label.outcomes["empty"] for label in summary.labels.values()] == [1, 1, 2]
    if empty == "agree":
        assert numbers == {1: 2, 2: 2, 3: 2}
        np.testing.assert_allclose(means, [0.75, 0.9, 1.0])
        np.testing.assert_allclose(summary.over_labels["dice"].mean, (0.75 + 0.9 + 1) / 3)
    else:
        assert numbers == {1: 1, 2: 1, 3: 0}
        np.testing.assert_allclose(means, [0.5, 0.8, np.nan])
        np.testing.assert_allclose(summary.over_labels["dice"].mean, (0.5 + 0.8) / 2)
    expected = (0.8 + 1 + 1) / 3 if empty == "agree" else 0.8
    np.testing.assert_allclose(case_mean(cases[1], [1, 2, 3], "dice", empty), expected)


def test_one_case_has_no_interval():
    estimate = summarize([{1: scores(0.5)}], [1], resamples=10).labels[1].estimates["dice"]
    assert estimate.mean == 0.5
    assert np.isnan([estimate.low, estimate.high, estimate.median]).all()


def test_interval_over_labels_is_of_draws_of_cases():
    # The two labels always add up to one, so their mean is the same in every draw.
    rng = np.random.default_rng(0)
    cases = [{1: scores(dice), 2: scores(1 - dice)} for dice in rng.random(20)]
    summary = summarize(cases, [1, 2], resamples=200)
    assert summary.labels[1].estimates["dice"].high - summary.labels[1].estimates["dice"].low > 0.1
    np.testing.assert_allclose(summary.over_labels["dice"][:3], 0.5)


def test_nothing_to_summarize():
    with pytest.raises(ValueError, match="ids: none given"):
        summarize([{}], [])
    with pytest.raises(ValueError, match="cases: none given"):
        summarize([], [1])
    with pytest.raises(ValueError, match="resamples=0: must be at least 1"):
        summarize([{}], [1], resamples=0)
