"""Overlapping regions of a scan from logits on the model's grid, block by block."""

from collections.abc import Sequence

import numpy as np

from unetr_flax.imaging.model_grid import ModelGrid
from unetr_flax.imaging.restore import Restorer


class RegionRestorer:
    """Restores regions that may overlap, each where its own probability is above one half.

    A region against the rest is a problem of two classes whose logits are 0 and the region's, so
    the voxels at a border are interpolated as those of classes are, see `Restorer`.

    Args:
      grid: the model's grid of the scan.
      num_regions: number of regions R, at most 64.
      probabilities: an array [X, Y, Z, R], in memory or on disk, to fill with the sigmoid of the
        interpolated logits; None to restore labels only.
    """

    def __init__(self, grid: ModelGrid, num_regions: int, probabilities: np.ndarray | None = None):
        self._restorers = [
            Restorer(grid, 2, None if probabilities is None else probabilities[..., r : r + 1])
            for r in range(num_regions)
        ]

    def add(self, start: Sequence[int], logits: np.ndarray) -> None:
        """Restores the voxels of the scan that a block suffices for.

        Args:
          start: first voxel of the block on the model's grid.
          logits: [*block, R], of a sigmoid.
        """
        for region, restorer in enumerate(self._restorers):
            logit = logits[..., region]
            restorer.add(start, np.stack([np.zeros_like(logit), logit], axis=-1))

    @property
    def labels(self) -> np.ndarray:
        """The sum of 2^r over the regions r that hold each voxel, the smallest unsigned type."""
        dtype = np.min_scalar_type(2 ** len(self._restorers) - 1)
        codes = np.zeros(self._restorers[0].labels.shape, dtype)
        for region, restorer in enumerate(self._restorers):
            codes |= restorer.labels.astype(dtype) << region
        return codes
