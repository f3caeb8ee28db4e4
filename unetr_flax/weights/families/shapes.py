"""Sizes of a model, read off the shapes of its arrays."""

import re
from collections.abc import Sequence

from unetr_flax.weights.errors import CheckpointError


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes by key of a state dict; a missing key is a `CheckpointError` that names it."""

    def __missing__(self, key: str):
        raise CheckpointError(f"state dict: {key} is missing, and needed to tell the model's sizes")

    def axes(self, key: str, count: int) -> tuple[int, ...]:
        """Returns a shape that must have so many axes.

        Raises:
          CheckpointError: if it has more or fewer.
        """
        if len(self[key]) != count:
            raise CheckpointError(
                f"state dict: {key} has shape {self[key]}, must have {count} axes"
            )
        return self[key]

    def count(self, pattern: str) -> int:
        """Counts transformer blocks by the number in their keys.

        Args:
          pattern: regular expression for one key of each block; its group is the block's number.

        Raises:
          CheckpointError: if the numbers are not those from 0 on.
        """
        numbers = {int(m[1]) for key in self if (m := re.fullmatch(pattern, key))}
        if numbers != set(range(len(numbers))):
            raise CheckpointError(f"state dict: transformer blocks {sorted(numbers)} have gaps")
        return len(numbers)


def image_size(
    img_size: Sequence[int] | None, patch_size: Sequence[int], tokens: int
) -> tuple[int, ...]:
    """Returns voxels per axis: the given ones, or those of a cube of patches.

    Args:
      img_size: voxels per axis, if the caller knows them.
      patch_size: voxels per patch and axis.
      tokens: number of patches.

    Raises:
      CheckpointError: if no size is given and so many patches do not make a cube.
    """
    if img_size is not None:
        return tuple(img_size)
    rank = len(patch_size)
    edge = round(tokens ** (1 / rank))
    if edge**rank != tokens:
        raise CheckpointError(
            f"img_size: {tokens} position embeddings are not those of {rank} equal axes, so it "
            "must be given"
        )
    return tuple(edge * patch for patch in patch_size)
