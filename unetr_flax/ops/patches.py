"""Patches of a grid as channels, and back."""

import math
from collections.abc import Sequence

import jax


def depth_to_space(y: jax.Array, patch: Sequence[int], features: int) -> jax.Array:
    """Spreads the channels of each voxel over a patch: [N, *S, *P O] -> [N, *(S * P), O]."""
    n, *grid, _ = y.shape
    rank = len(patch)
    y = y.reshape(n, *grid, *patch, features)
    pairs = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    y = y.transpose(0, *pairs, 1 + 2 * rank)
    return y.reshape(n, *(s * p for s, p in zip(grid, patch, strict=True)), features)


def space_to_depth(y: jax.Array, patch: Sequence[int]) -> jax.Array:
    """Gathers patches as channels, the inverse of `depth_to_space`."""
    n, *size, features = y.shape
    rank = len(patch)
    grid = [s // p for s, p in zip(size, patch, strict=True)]
    y = y.reshape(n, *(k for pair in zip(grid, patch, strict=True) for k in pair), features)
    y = y.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 1 + 2 * rank)
    return y.reshape(n, *grid, math.prod(patch) * features)
