from pathlib import Path

import pytest

from train.data.dataset import DataError, Dataset
from train.data.label_names import Labels, find_sided, parse_labels, with_regions

PATH = Path("dataset.json")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"0": "bg", "2": "b", "1": "a"}, Labels(("bg", "a", "b"))),
        ({"a": 1, "bg": 0, "b": 2}, Labels(("bg", "a", "b"))),
        ({"0": "bg", "1": "a", "255": "ignore"}, Labels(("bg", "a"))),
        ({"bg": 0, "a": 1, "ignore": 2}, Labels(("bg", "a"), ignored_id=2)),
        ({"bg": 0, "w": [1, 2], "c": 2}, Labels(("bg", "w", "c"), ((1, 2), (2,)))),
        # With so many classes 255 is one of them.
        (
            {str(i): f"c{i}" for i in range(256)},
            Labels(tuple(f"c{i}" for i in range(256)), ignored_id=None),
        ),
    ],
)
def test_both_forms(content, expected):
    assert parse_labels(content, PATH) == expected


def test_bad_forms():
    with pytest.raises(DataError, match="ignore: must be one id"):
        parse_labels({"bg": 0, "a": 1, "ignore": [2]}, PATH)
    with pytest.raises(DataError, match="two ids have the same name"):
        parse_labels({"0": "a", "1": "a"}, PATH)


def test_the_class_order_of_nnunet():
    labels = {"bg": 0, "w": [1, 2], "c": [2]}
    assert parse_labels(labels, PATH, [1, 2]).regions_class_order == (1, 2)
    for order in ([1], [1, 1], [0, 1], [1, 2, 3], 5, [1, 2, "3"]):
        with pytest.raises(ValueError, match="regions_class_order: must be a list of 2 different"):
            parse_labels(labels, PATH, order)


def test_regions_of_options():
    dataset = Dataset("BraTS", ("T1",), ("background", "edema", "core", "enhancing"), ())
    joined = with_regions(dataset, ("WT=1,2,3", "TC=2,3"))
    assert joined.labels == ("background", "WT", "TC")
    assert (joined.target, joined.regions, joined.num_outputs) == (
        "regions",
        ((1, 2, 3), (2, 3)),
        2,
    )
    assert joined.unused_ids == ()
    assert with_regions(dataset, ("ET=3", "edge=1,3")).unused_ids == (2,)
    for option, message in (
        ("WT", "must be NAME=ID,ID,..."),
        ("WT=1,x", "must be NAME=ID,ID,..."),
        ("WT=1,4", "ids must be 1 to 3"),
        ("WT=0", "ids must be 1 to 3"),
    ):
        with pytest.raises(ValueError, match=f"^--regions {option}: {message}"):
            with_regions(dataset, (option,))
    with pytest.raises(ValueError, match="has regions of its own"):
        with_regions(joined, ("a=1",))


@pytest.mark.parametrize(
    ("labels", "sided"),
    [
        (("bg", "spleen", "left kidney"), "left kidney"),
        (("bg", "left_kidney", "right_kidney"), "left_kidney"),
        (("bg", "Right-Hippocampus"), "Right-Hippocampus"),
        (("bg", "kidney (left)"), "kidney (left)"),
        (("bg", "LeftKidney"), "LeftKidney"),
        (("bg", "kidneyRight2"), "kidneyRight2"),
        (("bg", "LUNG_LT"), "LUNG_LT"),
        (("bg", "ctx-rh-cuneus"), "ctx-rh-cuneus"),
        (("bg", "kidney_r", "kidney_l"), "kidney_r"),
        (("bg", "LKidney", "RKidney"), "LKidney"),
        # A letter alone may be a vertebra; other words only look like sides.
        (("bg", "vertebra_L5", "vertebra_T12"), None),
        (("bg", "leftover", "upright", "cleft", "liver"), None),
    ],
)
def test_labels_of_one_side_are_found(labels, sided):
    assert find_sided(labels) == sided
