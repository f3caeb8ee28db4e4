import jax
import numpy as np
import pytest

from unetr_flax.ops.tpu_slices import axis_of_slices, kernel_turned, turned


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 96, 96, 96, 16), 1),
        ((1, 34, 128, 128, 16), 2),
        ((1, 34, 120, 128, 16), 3),
        ((0, 64, 96, 96, 16), 2),
        # 130 slices take two registers, of which almost a half is empty.
        ((1, 130, 96, 128, 16), 3),
    ],
)
def test_slices_are_those_that_are_padded_least(shape, axis):
    assert axis_of_slices(jax.ShapeDtypeStruct(shape, np.float32)) == axis


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_axes_are_exchanged_together_and_back(axis):
    x = np.zeros((1, 2, 3, 4, 5))
    kernel = np.zeros((2, 3, 4, 5, 6))
    assert turned(x, axis).shape[1:4] == kernel_turned(kernel, axis).shape[:3]
    assert turned(x, axis).shape[1] == x.shape[axis]
    assert turned(turned(x, axis), axis).shape == x.shape
    assert kernel_turned(kernel_turned(kernel, axis), axis).shape == kernel.shape
