import numpy as np
import pytest

from unetr_flax.viewing.planes import AXIAL, CORONAL, PLANES, SAGITTAL, largest_slices

SHAPE = (4, 5, 6)
# The direction in which each axis of the canonical grid grows, and the opposite one.
DIRECTIONS = ("RL", "AP", "SI")


@pytest.mark.parametrize("plane", PLANES, ids=lambda plane: plane.name)
def test_letters_name_the_directions_of_the_pixels(plane):
    left, right, top, bottom = plane.edges
    assert DIRECTIONS[plane.across] == left + right
    assert DIRECTIONS[plane.down] == top + bottom
    for axis in (plane.across, plane.down):
        # Brightest where the axis ends, in the direction of its first letter.
        image = plane.take(np.indices(SHAPE)[axis], 2)
        assert image.shape == (SHAPE[plane.down], SHAPE[plane.across])
        row, column = np.unravel_index(image.argmax(), image.shape)
        assert (row, column) == (0, 0)
        changes = image[0, -1] != image[0, 0], image[-1, 0] != image[0, 0]
        assert changes == (axis == plane.across, axis == plane.down)


def test_largest_slice():
    labels = np.zeros(SHAPE, np.uint8)
    labels[1, 3, 4] = labels[1, 2, 4] = 7
    labels[3, 3, 0] = 1
    assert [plane.largest(labels) for plane in (SAGITTAL, CORONAL, AXIAL)] == [1, 3, 4]
    assert [plane.largest(labels * 0) for plane in (SAGITTAL, CORONAL, AXIAL)] == [2, 2, 3]


def test_largest_slices_of_each_class():
    labels = np.zeros(SHAPE, np.uint16)
    labels[1, 3, 4] = labels[1, 2, 4] = 700
    labels[3, 3, 0] = 1
    assert largest_slices(labels, [1, 700]) == ([(3, 3, 0), (1, 2, 4)], (1, 3, 4))
    assert largest_slices(labels * 0, []) == ([], (2, 2, 3))
