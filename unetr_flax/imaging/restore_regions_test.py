import numpy as np
import pytest

from unetr_flax.imaging.model_grid import ModelGrid
from unetr_flax.imaging.restore_regions import RegionRestorer


@pytest.mark.parametrize("shape", [(6, 5, 4), (9, 4, 6)])
def test_regions_are_where_their_interpolated_logit_is_above_zero(shape):
    pytest.importorskip("scipy")
    grid = ModelGrid((8, 7, 6), (1, 1, 1), (6, 5, 4), shape, (1.0, 1.0, 1.0))
    logits = np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32)
    probabilities = np.full((*grid.scan_shape, 2), np.nan, np.float32)
    restorer = RegionRestorer(grid, 2, probabilities)
    labels_only = RegionRestorer(grid, 2)
    labels_only.add((0, 0, 0), logits)
    restorer.add((0, 0, 0), logits)
    inside = grid.restore_logits(np.concatenate([np.zeros((*shape, 1), np.float32), logits], -1))
    expected = (inside[..., 1] > 0) + 2 * (inside[..., 2] > 0)
    assert restorer.labels.dtype == np.uint8
    np.testing.assert_array_equal(restorer.labels, expected)
    np.testing.assert_array_equal(labels_only.labels, expected)
    box = tuple(slice(1, 1 + n) for n in grid.box_size)
    sigmoid = 1 / (1 + np.exp(-inside[box][..., 1:]))
    np.testing.assert_allclose(probabilities[box], sigmoid, rtol=1e-5)
    probabilities[box] = 0
    # No region reaches outside of the box that the model saw.
    assert not probabilities.any()


@pytest.mark.parametrize("count", [9, 32, 33, 64])
def test_every_region_has_a_bit_of_its_own(count):
    # Voxel r along the first axis is in the regions up to r.
    logits = np.where(np.tri(count, dtype=bool), np.float32(5), np.float32(-5))
    logits = logits.reshape(count, 1, 1, count)
    grid = ModelGrid(logits.shape[:3], (0, 0, 0), logits.shape[:3], logits.shape[:3], (1, 1, 1))
    restorer = RegionRestorer(grid, count)
    restorer.add((0, 0, 0), logits)
    assert restorer.labels.ravel().tolist() == [2 ** (r + 1) - 1 for r in range(count)]
