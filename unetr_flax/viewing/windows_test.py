import numpy as np
import pytest

from unetr_flax.viewing.windows import CT_WINDOWS, window_presets


def test_ct_starts_with_the_window_of_the_model():
    presets = window_presets(np.zeros((1, 1, 1)), (-175, 250))
    assert next(iter(presets.values())) == (-175, 250)
    assert presets.keys() >= CT_WINDOWS.keys()


def test_other_images_start_with_percentiles_of_the_nonzero_voxels():
    channel = np.zeros((10, 10, 202), np.float32)
    channel[..., :101] = np.arange(1, 102)
    first, *_, last = window_presets(channel, None).values()
    assert first == (2, 100)
    assert last == (1, 101)


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_constant_images_have_a_window(value):
    for low, high in window_presets(np.full((2, 3, 4), value), None).values():
        assert low < value < high
