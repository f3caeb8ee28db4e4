import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from train.data.dataset import Dataset
from train.data.targets import IGNORED, count_labels, drawn_classes, encode, region_masks

# Regions of BraTS: whole tumor, tumor core, enhancing tumor.
BRATS = Dataset(
    "BraTS",
    ("T1",),
    ("background", "WT", "TC", "ET"),
    (),
    target="regions",
    regions=((1, 2, 3), (2, 3), (3,)),
)
CLASSES = Dataset("Classes", ("CT",), ("background", "a", "b"), ())
MASKS = Dataset("Masks", ("CT",), ("background", "a", "b"), (), target="masks")


def labels(*ids):
    return np.array(ids, np.int32).reshape(1, 1, -1, 1)


def test_classes_are_their_own_targets():
    ids = labels(0, 1, 2, 255, 1)
    np.testing.assert_array_equal(encode(CLASSES, ids).ravel(), [0, 1, 2, IGNORED, 1])
    assert count_labels(CLASSES, encode(CLASSES, ids)) == [1, 2, 1]


def test_regions_overlap():
    targets = encode(BRATS, labels(0, 1, 2, 3, 255))
    np.testing.assert_array_equal(targets.ravel(), [0, 1, 3, 7, IGNORED])
    masks = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [IGNORED] * 3]
    for array in (targets, jnp.asarray(targets)):
        np.testing.assert_array_equal(region_masks(array, 3)[0, 0], masks)
    np.testing.assert_array_equal(drawn_classes(BRATS, targets).ravel(), [0, 1, 2, 3, 0])
    assert count_labels(BRATS, targets) == [1, 3, 2, 1]


def test_classes_in_no_region_are_background():
    dataset = dataclasses.replace(
        BRATS, labels=("background", "ET"), regions=((3,),), unused_ids=(1, 2, 4)
    )
    targets = encode(dataset, labels(0, 1, 2, 3, 4, 255))
    np.testing.assert_array_equal(targets.ravel(), [0, 0, 0, 1, 0, IGNORED])
    assert count_labels(dataset, targets) == [4, 1]
    with pytest.raises(ValueError, match=r"^label ids \[5\], declared are 0 to 4"):
        encode(dataset, labels(5))


def test_masks_may_overlap():
    masks = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [255, 1]], np.int32)[None, None]
    targets = encode(MASKS, masks)
    np.testing.assert_array_equal(targets.ravel(), [0, 1, 2, 3, IGNORED])
    np.testing.assert_array_equal(region_masks(targets, 2)[0, 0, :4], masks[0, 0, :4])
    assert count_labels(MASKS, targets) == [1, 2, 2]


@pytest.mark.parametrize(
    ("dataset", "array", "message"),
    [
        (CLASSES, labels(0, 7, -2), r"label ids \[-2, 7\], declared are 0 to 2"),
        (CLASSES, labels(0, 10**9), r"label ids \[1000000000\], declared are 0 to 2"),
        (CLASSES, labels(*range(3, 20)), r"label ids \[3, .*, 12, \.\.\.\], declared"),
        (BRATS, labels(0, 4), r"label ids \[4\], declared are 0 to 3"),
        (CLASSES, np.zeros((2, 2, 2, 3), np.int32), "3 channels, its label maps must have 1"),
        (MASKS, np.zeros((2, 2, 2, 3), np.int32), "3 channels, its label maps must have 2"),
        (MASKS, np.full((2, 2, 2, 2), 2, np.int32), r"label ids \[2\], masks must hold 0 and 1"),
    ],
)
def test_undeclared_numbers_are_shown(dataset, array, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        encode(dataset, array)
