import numpy as np
import pytest

from unetr_flax.inference.postprocess import fill_holes, keep_largest, keep_only


def test_the_largest_connected_part_of_each_class_is_kept():
    labels = np.zeros((8, 7, 6), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[2, 2, 2] = 1  # connected by corners
    labels[5:7, 6, 5] = 1
    labels[4, :4, 4] = 3
    labels[4, 5, 4] = 3
    expected = labels.copy()
    expected[5:7, 6, 5] = 0
    keep_largest(labels, [1, 2, 9])
    np.testing.assert_array_equal(labels, expected)
    expected[4, 5, 4] = 0
    keep_largest(labels, range(1, 4))
    np.testing.assert_array_equal(labels, expected)


def test_enclosed_background_is_filled_and_other_classes_stay():
    labels = np.zeros((9, 8, 7), np.uint16)
    labels[1:8, 1:7, 1:6] = 300
    labels[3:6, 3:5, 3] = 0
    labels[4, 3, 3] = 2
    open_hole = labels.copy()
    open_hole[3, 3, 3:] = 0
    expected = np.where(labels == 2, 2, 0)
    expected[1:8, 1:7, 1:6][labels[1:8, 1:7, 1:6] != 2] = 300
    fill_holes(labels, [2, 300])
    np.testing.assert_array_equal(labels, expected)
    untouched = open_hole.copy()
    fill_holes(open_hole, [2, 300])
    np.testing.assert_array_equal(open_hole, untouched)


def test_a_hole_in_a_slice_that_is_open_along_the_third_axis_stays():
    labels = np.zeros((5, 5, 3), np.uint8)
    labels[1:4, 1:4] = 1
    labels[2, 2] = 0
    expected = labels.copy()
    fill_holes(labels, [1])
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_only_some_classes_are_kept(dtype):
    labels = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    expected = np.where(np.isin(labels, [3, 23]), labels, 0)
    keep_only(labels, [3, 23])
    np.testing.assert_array_equal(labels, expected)
    keep_only(labels, [])
    assert not labels.any()


def test_an_empty_label_map_stays_empty():
    labels = np.zeros((3, 3, 3), np.uint8)
    keep_largest(labels, range(1, 3))
    fill_holes(labels, range(1, 3))
    assert not labels.any()
