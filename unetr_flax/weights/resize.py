"""Interpolation of position embeddings for another image size."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.convert import plain_tree
from unetr_flax.weights.errors import WeightsError

PATH = ("params", "encoder", "embedding", "position_embedding")


def resize_position_embedding(
    cfg: UNETRConfig, variables: Mapping[str, Any], img_size: Sequence[int]
) -> tuple[UNETRConfig, dict[str, Any]]:
    """Makes the same model for images of another size, its positions interpolated between patches.

    Interpolation is linear along each axis of the grid of patches, with the half-voxel centers
    and clamped edges of torch's `interpolate(mode="trilinear", align_corners=False)`.

    Args:
      cfg: the model's configuration.
      variables: its variables; position embedding [1, N, E].
      img_size: voxels per spatial axis.

    Returns:
      The configuration with `img_size` and the variables with the position embedding [1, M, E]
      of its grid, in its own dtype; all other leaves are the same objects.

    Raises:
      WeightsError: if the variables have no position embedding of cfg's shape.
      ValueError: if the model cannot have this image size.
    """
    resized = dataclasses.replace(cfg, img_size=img_size)
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(plain_tree(variables))
    expected = (1, cfg.num_patches, cfg.hidden_size)
    found = np.shape(leaves[PATH]) if PATH in leaves else "missing"
    if found != expected:
        raise WeightsError(f"variables: {'/'.join(PATH)} is {found}, must be {expected}")
    if resized.grid_size != cfg.grid_size:
        leaves[PATH] = resize_positions(np.asarray(leaves[PATH]), cfg.grid_size, resized.grid_size)
    return resized, traverse_util.unflatten_dict(leaves)


def resize_positions(
    positions: np.ndarray, grid_size: Sequence[int], new_grid_size: Sequence[int]
) -> np.ndarray:
    """Interpolates position embeddings, as `resize_position_embedding` says.

    Args:
      positions: [1, N, E], patches in row-major order.
      grid_size: patches per axis, N in all.
      new_grid_size: patches per axis of the result, M in all.

    Returns:
      [1, M, E] of the same dtype.
    """
    grid = positions.astype(np.float64).reshape(*grid_size, positions.shape[-1])
    for axis, size in enumerate(new_grid_size):
        grid = _resize_axis(grid, axis, size)
    return grid.reshape(1, -1, positions.shape[-1]).astype(positions.dtype)


def _resize_axis(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Interpolates linearly to `size` points along one axis."""
    last = array.shape[axis] - 1
    # Centers of the new points, in units of the old points and clamped to the outermost of them.
    centers = (np.arange(size) + 0.5) * (array.shape[axis] / size) - 0.5
    centers = np.clip(centers, 0, last)
    low = np.floor(centers).astype(int)
    high = np.minimum(low + 1, last)
    weight = (centers - low).reshape(-1, *[1] * (array.ndim - axis - 1))
    return array.take(low, axis) * (1 - weight) + array.take(high, axis) * weight
