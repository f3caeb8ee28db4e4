import numpy as np
import pytest

from unetr_flax.viewing.planes import PLANES

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
