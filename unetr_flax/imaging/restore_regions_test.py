import numpy as np
import pytest

from unetr_flax.imaging.model_grid import ModelGrid
from unetr_flax.imaging.restore_regions import RegionRestorer


@pytest.mark.parametrize("shape", [(6, 5, 4), (9, 4, 6)])
def test_regions_are_where_their_interpolated_logit_is_above_zero(shape):
    pytest.importorskip("scipy")
    grid = ModelGrid((8, 7, 6), (1, 1, 1), (6, 5, 4), shape, (1.0, 1.0, 1.0))
    logits = np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32)
    restorer = RegionRestorer(grid, 2)
    restorer.add((0, 0, 0), logits)
    inside = grid.restore_logits(np.concatenate([np.zeros((*shape, 1), np.float32), logits], -1))
    expected = (inside[..., 1] > 0) + 2 * (inside[..., 2] > 0)
    assert restorer.labels.dtype == np.int32
    np.testing.assert_array_equal(restorer.labels, expected)
