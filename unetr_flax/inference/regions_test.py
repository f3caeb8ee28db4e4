from pathlib import Path

import numpy as np
import pytest

from unetr_flax.inference.regions import Regions
from unetr_flax.weights import CheckpointError

BRATS = {"names": ("WT", "TC", "ET"), "ids": ((1, 2, 3), (2, 3), (3,))}


def test_nested_regions_become_the_classes_they_were_joined_of():
    regions = Regions.from_ids(**BRATS)
    assert regions.painted == ((0, 1), (1, 2), (2, 3))
    assert regions.classes == {0: "background", 1: "WT without TC", 2: "TC without ET", 3: "ET"}
    # Bits of the regions, the last two without the regions that should be around them.
    codes = np.array([0, 0b001, 0b011, 0b111, 0b100, 0b110]).reshape(3, 2, 1)
    labels = regions.decode(codes)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels.ravel(), [0, 1, 2, 3, 3, 3])
    assert regions.describe() == (
        "regions WT, TC, ET: written as label maps of 1 WT without TC, 2 TC without ET, 3 ET"
    )


def test_the_order_of_the_options_does_not_matter():
    regions = Regions.from_ids(["ET", "WT", "TC", "other"], [[4], [1, 4, 2], [4, 2], [7]])
    assert regions.painted == ((1, 1), (2, 2), (0, 4), (3, 7))
    assert regions.classes[1] == "WT without TC"
    np.testing.assert_array_equal(
        regions.decode(np.array([[[0b0010, 0b0110, 0b0111, 0b1000]]])), [[[1, 2, 4, 7]]]
    )


@pytest.mark.parametrize(
    "ids",
    [
        (),  # masks
        ((1, 2), (2, 3)),  # overlap without nesting
        ((1, 2, 3), (3,)),  # two classes that no region tells apart
        ((1,), (1,)),  # the same twice
    ],
)
def test_other_regions_become_masks(ids):
    regions = Regions.from_ids(("a", "b"), ids)
    assert not regions.painted
    assert regions.classes == {0: "background", 1: "a", 2: "b"}
    masks = regions.decode(np.array([0, 1, 2, 3]).reshape(2, 2, 1))
    assert masks.dtype == np.uint8
    np.testing.assert_array_equal(masks.reshape(4, 2), [[0, 0], [1, 0], [0, 1], [1, 1]])
    assert regions.describe() == "regions a, b: written as 4D masks, one volume for each region"


def test_as_many_regions_as_a_code_has_bits():
    regions = Regions.from_ids([str(r) for r in range(64)])
    codes = np.array([1, 2**31, 2**32 + 2**63], np.uint64).reshape(3, 1, 1)
    masks = regions.decode(codes).reshape(3, 64)
    assert [np.flatnonzero(row).tolist() for row in masks] == [[0], [31], [32, 63]]


def test_a_declared_order_is_obeyed():
    regions = Regions.from_ids(("a", "b"), ((1, 2), (2, 3)), (300, 2))
    np.testing.assert_array_equal(regions.decode(np.array([[[0, 1, 2, 3]]])), [[[0, 300, 2, 2]]])
    assert regions.classes == {0: "background", 300: "a without b", 2: "b"}


def test_what_a_folder_tells():
    path = Path("model")
    assert Regions.from_provenance(path, None) is None
    assert Regions.from_provenance(path, {"regions": []}) is None
    told = {"regions": ["WT", "TC", "ET"], "region_ids": [[1, 2, 3], [2, 3], [3]]}
    assert Regions.from_provenance(path, told) == Regions.from_ids(**BRATS)
    # Folders of older versions tell names only.
    assert not Regions.from_provenance(path, {"regions": ["WT"]}).painted
    for change, message in (
        ({"regions": "WT"}, "regions: must be a list of names, not 'WT'"),
        ({"regions": ["a", "b", "a"]}, "regions: a, b, a: must be different names"),
        ({"regions": ["a", "b", "background"]}, "regions: a, b, background: must be different"),
        ({"regions": list("abcde" * 13), "region_ids": []}, "regions: 65, must be at most 64"),
        ({"region_ids": [[1], [2]]}, "region_ids: must be a list of class ids above 0 for each"),
        ({"region_ids": [[1], [2], [0]]}, "region_ids: must be"),
        ({"region_ids": {"WT": 1}}, "region_ids: must be"),
        ({"regions_class_order": [1, 2]}, "regions_class_order: must be a different class id"),
        ({"regions_class_order": [1, 2, 10**9]}, "regions_class_order: must be"),
    ):
        with pytest.raises(CheckpointError, match=f"^model: {message}") as error:
            Regions.from_provenance(path, told | change)
        assert "\n" not in str(error.value)
