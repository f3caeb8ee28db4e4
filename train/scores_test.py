import json
import math

import numpy as np
import pytest

from train.data.dataset import Dataset
from train.scores import Validation, judge
from unetr_flax.evaluation.scores import evaluate_case

CLASSES = Dataset("a", ("MRI",), ("background", "x", "y"), ())
REGIONS = Dataset(
    "a", ("MRI",), ("background", "x", "y"), (), target="regions", regions=((1, 2), (2,))
)
SPACING = (1.0, 1.5, 2.0)


def boxes(shift=0):
    """Returns a map of class 1 with class 2 inside."""
    classes = np.zeros((12, 10, 8), np.int32)
    classes[2 + shift : 9, 2:8, 1:7] = 1
    classes[4 : 6 + shift, 3:6, 2:5] = 2
    return classes


def codes(classes):
    """Makes the codes of regions of which the first holds both classes, the second class 2."""
    return (classes > 0) * 1 + (classes == 2) * 2


def test_classes_get_the_scores_of_an_evaluation():
    validation = Validation.of_cases(["c"], [judge(CLASSES, boxes(1), boxes(), SPACING)])
    expected = evaluate_case(boxes(1), boxes(), SPACING)
    assert validation.cases["c"] == expected
    np.testing.assert_allclose(validation.per_class[1:], [expected[i].dice for i in (1, 2)])
    assert validation.mean("hd95", 2) == expected[2].hd95 > 0
    assert validation.mean_over_labels("surface_dice") == pytest.approx(
        np.mean([expected[i].surface_dice for i in (1, 2)])
    )


def test_regions_get_the_scores_of_their_masks():
    scores = judge(REGIONS, codes(boxes(1)), codes(boxes()), SPACING)
    validation = Validation.of_cases(["c"], [scores])
    for region, members in ((1, (1, 2)), (2, (2,))):
        masks = [np.isin(boxes(shift), members).astype(np.uint8) for shift in (1, 0)]
        expected = evaluate_case(*masks, SPACING)[1]
        assert validation.cases["c"][region] == expected
        assert validation.per_class[region] == pytest.approx(expected.dice)
    assert validation.per_class[0] == pytest.approx(
        2 * np.sum((boxes(1) == 0) & (boxes() == 0)) / np.sum([boxes(1) == 0, boxes() == 0])
    )


@pytest.mark.parametrize(("dataset", "encode"), [(CLASSES, np.array), (REGIONS, codes)])
def test_ignored_voxels_count_nowhere(dataset, encode):
    ignored = np.zeros((12, 10, 8), bool)
    ignored[:, 5:] = True
    prediction, target = encode(boxes(1)), encode(boxes())
    target[ignored] = -1
    other = np.where(ignored, 1, prediction)
    first, second = (judge(dataset, p, target, SPACING) for p in (prediction, other))
    np.testing.assert_array_equal(first.counts, second.counts)
    np.testing.assert_array_equal(first.scores, second.scores)
    cut = judge(dataset, prediction[:, :5], target[:, :5], SPACING)
    np.testing.assert_array_equal(first.counts, cut.counts)


def test_structures_that_are_not_there():
    nothing = np.zeros((12, 10, 8), np.int32)
    names = ("good", "missed", "empty")
    pairs = ((boxes(), boxes()), (nothing, boxes()), (nothing, nothing))
    validation = Validation.of_cases(names, [judge(CLASSES, *pair, SPACING) for pair in pairs])
    assert validation.outcomes(1) == {"found": 1, "missed": 1, "invented": 0, "empty": 1}
    assert validation.per_class[1] == 0.5
    # No distance can be told where one of the two has no surface.
    assert validation.cases["missed"][1].hd95 == math.inf
    assert validation.mean("hd95", 1) == 0
    assert validation.mean("surface_dice", 1) == 0.5
    assert validation.worst_cases(2) == ["missed", "empty"]
    content = json.loads(json.dumps(validation.to_dict(), allow_nan=False))
    again = Validation.from_dict(content)
    assert again.cases == validation.cases
    np.testing.assert_array_equal(again.per_class, validation.per_class)
    only_empty = Validation.of_cases(["empty"], [judge(CLASSES, nothing, nothing, SPACING)])
    assert math.isnan(only_empty.mean_over_labels("hd95"))
