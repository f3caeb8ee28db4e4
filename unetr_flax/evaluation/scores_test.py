import dataclasses

import numpy as np
import pytest

from unetr_flax.evaluation.scores import METRICS, Scores, evaluate_case
from unetr_flax.evaluation.surface_distance import SurfaceDistances, surface

pytest.importorskip("scipy")

SPACING = (0.5, 2.0, 3.0)


def box(*sides, shape=(8, 9, 7)):
    mask = np.zeros(shape, np.int32)
    mask[tuple(slice(*side) for side in sides)] = 1
    return mask


LABEL = box((2, 5), (3, 6), (2, 5))


def test_surface_is_the_shell_of_a_box_also_at_the_border():
    cube = np.ones((3, 3, 3), bool)
    assert surface(cube).sum() == 26
    assert not surface(cube)[1, 1, 1]
    # A voxel whose neighbors along the axes are all inside is no surface, whatever its diagonals.
    cross = np.zeros((3, 3, 3), bool)
    cross[1, 1, :] = cross[1, :, 1] = cross[:, 1, 1] = True
    assert not surface(cross)[1, 1, 1]


def test_scores_by_hand_of_a_box_shifted_by_two_voxels():
    prediction = box((4, 7), (3, 6), (2, 5))
    scores = evaluate_case(prediction, LABEL, SPACING)[1]
    assert (scores.dice, scores.iou) == (9 * 2 / 54, 9 / 45)
    assert scores.prediction_ml == scores.label_ml == 27 * 3 / 1000
    assert scores.volume_difference == scores.relative_volume_difference == 0
    # The prediction's planes lie 0, 1 and 2 voxels of 0.5 mm beyond the label's last plane; they
    # have 9, 8 and 9 surface voxels, as the center of the box is no surface.
    distances = SurfaceDistances.from_masks(prediction == 1, LABEL == 1, SPACING)
    assert len(distances.from_prediction) == len(distances.from_label) == 26
    assert sorted(set(distances.from_prediction)) == [0.0, 0.5, 1.0]
    assert scores.hd95 == distances.hausdorff(100) == 1.0
    expected = (9 * 1.0 + 8 * 0.5 + 0) / 26
    np.testing.assert_allclose(scores.assd, expected, rtol=1e-12)
    for tolerance, correct in ((0.0, 9), (0.5, 17), (0.9, 17), (1.0, 26)):
        found = evaluate_case(prediction, LABEL, SPACING, tolerance=tolerance)[1].surface_dice
        np.testing.assert_allclose(found, correct / 26, rtol=1e-12)


def test_percentile_is_interpolated_and_the_larger_direction_counts():
    distances = SurfaceDistances(np.arange(11.0), np.zeros(5))
    assert distances.hausdorff(95) == 9.5
    assert SurfaceDistances(np.zeros(5), np.arange(11.0)).hausdorff(95) == 9.5
    assert distances.average() == 55 / 16


def test_volumes_are_in_milliliters_and_their_difference_is_signed():
    scores = evaluate_case(box((2, 5), (3, 6), (2, 4)), LABEL, (10.0, 10.0, 10.0))[1]
    assert (scores.prediction_ml, scores.label_ml) == (18, 27)
    assert scores.volume_difference == -9
    np.testing.assert_allclose(scores.relative_volume_difference, -1 / 3)


def test_a_structure_in_neither_is_an_agreement():
    scores = evaluate_case(LABEL, LABEL, SPACING, ids=[1, 7])
    assert scores[7] == Scores.both_empty()
    assert scores[7].outcome == "empty"
    values = {metric.name: getattr(scores[7], metric.name) for metric in METRICS}
    assert values == {
        "dice": 1,
        "iou": 1,
        "surface_dice": 1,
        "hd95": 0,
        "assd": 0,
        "volume_difference": 0,
        "relative_volume_difference": 0,
    }
    # So is a structure that both have at the same place.
    same = dataclasses.asdict(scores[1])
    assert same.pop("prediction_ml") == same.pop("label_ml") > 0
    assert same == {"dice": 1, "iou": 1, "hd95": 0, "surface_dice": 1, "assd": 0}


@pytest.mark.parametrize("outcome", ["missed", "invented"])
def test_a_structure_in_only_one_is_infinitely_far(outcome):
    pair = (0 * LABEL, LABEL) if outcome == "missed" else (LABEL, 0 * LABEL)
    scores = evaluate_case(*pair, SPACING)[1]
    assert scores.outcome == outcome
    assert (scores.dice, scores.iou, scores.surface_dice) == (0, 0, 0)
    assert (scores.hd95, scores.assd) == (np.inf, np.inf)
    assert scores.relative_volume_difference == (-1 if outcome == "missed" else np.inf)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
def test_labels_are_scored_apart_whatever_the_dtype(dtype):
    label = 40 * box((0, 3), (3, 6), (2, 5)) + 200 * box((5, 8), (0, 2), (0, 3))
    prediction = label.copy()
    prediction[prediction == 40] = 0
    label, prediction = label.astype(dtype), prediction.astype(dtype)
    if dtype == np.int16:
        label = np.asfortranarray(label)
    scores = evaluate_case(prediction, label, SPACING)
    assert [(i, scores[i].outcome) for i in scores] == [(40, "missed"), (200, "found")]
    assert scores[200].dice == 1


def test_two_axes():
    label = box((2, 5), (3, 6), shape=(7, 8))
    scores = evaluate_case(np.roll(label, 1, 1), label, (1.0, 4.0))[1]
    assert (scores.dice, scores.hd95) == (6 * 2 / 18, 4.0)


@pytest.mark.parametrize(
    ("prediction", "spacing", "tolerance", "message"),
    [
        (LABEL[1:], SPACING, 1.0, r"prediction: shape \(7, 9, 7\), must be the label's"),
        (LABEL.astype(float), SPACING, 1.0, "prediction: float64, must be integers"),
        (-LABEL, SPACING, 1.0, "prediction: labels -1 to 0, must be 0 to 65535"),
        (LABEL * 70000, SPACING, 1.0, "prediction: labels 0 to 70000, must be 0 to 65535"),
        (LABEL, (1.0, 2.0), 1.0, r"spacing=\(1.0, 2.0\): must be 3 lengths"),
        (LABEL, (1.0, 2.0, 0.0), 1.0, "must be 3 lengths"),
        (LABEL, SPACING, -1.0, "tolerance=-1.0: must be a distance"),
        (LABEL, SPACING, float("nan"), "tolerance=nan: must be a distance"),
    ],
)
def test_bad_input_is_named(prediction, spacing, tolerance, message):
    with pytest.raises(ValueError, match=message):
        evaluate_case(prediction, LABEL, spacing, tolerance=tolerance)
