import numpy as np
import pytest

from unetr_flax.imaging.padding import centered_start, crop_or_pad

ARRAY = np.arange(5 * 4 * 2, dtype=np.float32).reshape(5, 4, 2)


@pytest.mark.parametrize("start", [(-7, 1), (-2, -1), (0, 0), (1, 3), (4, -3), (6, 9)])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 4), (9, 7), (2, 8)])
def test_every_voxel_is_the_array_s_or_the_filling(start, size):
    box = crop_or_pad(ARRAY, start, size, fill=[-1.0, -2.0])
    assert box.shape == (*size, 2)
    assert box.dtype == ARRAY.dtype
    for i, j in np.ndindex(*size):
        x, y = start[0] + i, start[1] + j
        inside = 0 <= x < 5 and 0 <= y < 4
        np.testing.assert_array_equal(box[i, j], ARRAY[x, y] if inside else [-1, -2])


def test_filling_is_zero_unless_given_and_all_axes_may_be_cut():
    labels = np.ones((2, 3), np.int32)
    box = crop_or_pad(labels, (-1, 1), (4, 3))
    np.testing.assert_array_equal(box, [[0, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]])
    assert box.dtype == np.int32


def test_a_box_inside_the_array_is_not_copied():
    assert np.shares_memory(crop_or_pad(ARRAY, (1, 0), (3, 4)), ARRAY)
    assert not np.shares_memory(crop_or_pad(ARRAY, (3, 0), (3, 4)), ARRAY)


@pytest.mark.parametrize("size", [(9, 7), (6, 5), (5, 9)])
def test_padding_is_undone_by_the_negated_start(size):
    start = centered_start(ARRAY.shape[:2], size)
    padded = crop_or_pad(ARRAY, start, size, fill=7)
    back = crop_or_pad(padded, [-s for s in start], ARRAY.shape[:2])
    np.testing.assert_array_equal(back, ARRAY)


@pytest.mark.parametrize(
    ("axis", "length", "start"),
    [(5, 5, 0), (5, 3, 1), (6, 3, 1), (3, 5, -1), (3, 6, -1), (3, 4, 0), (4, 3, 0)],
)
def test_the_odd_voxel_is_at_the_end(axis, length, start):
    assert centered_start((axis,), (length,)) == (start,)


def test_start_and_size_must_fit_the_array():
    with pytest.raises(ValueError, match="argument"):
        crop_or_pad(ARRAY, (0,), (1, 1))
