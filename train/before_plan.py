"""What can be judged of a run before its plan: the options that the command line gives."""

import dataclasses
from collections.abc import Sequence

from train.checks import MAX_NUMBER
from train.command_line import given
from train.config import Config

# The patches that a plan chooses from, and the least width of its tokens.
PATCHES = (16, 8, 4)
LEAST_HIDDEN_SIZE = 48


def whole_patches(roi_size: Sequence[int], largest: int) -> tuple[int, int, int]:
    """Chooses the largest patches that crops of a size hold in whole numbers, as far as any do.

    Args:
      roi_size: voxels of a crop per axis.
      largest: the most voxels of a patch per axis, one of `PATCHES`.
    """
    allowed = [patch for patch in PATCHES if patch <= largest]
    x, y, z = (next((p for p in allowed if n % p == 0), PATCHES[-1]) for n in roi_size)
    return x, y, z


def rounded_up(number: int, unit: int) -> int:
    """Returns the least multiple of a unit that is not below a number."""
    return -(-number // unit) * unit


def provisional(args: Sequence[str], cfg: Config) -> Config:
    """Fits options that the plan will choose to those that are given, so that only these count.

    Their sizes are the least that a plan could choose.

    Args:
      args: the command line.
      cfg: its options, with defaults for those that are not given.
    """
    names, data, model = given(args), cfg.data, cfg.model
    if "batch_size" not in names:
        parts = min(max(1, cfg.training.accumulate), MAX_NUMBER)
        data = dataclasses.replace(data, batch_size=rounded_up(data.batch_size, parts))
    if "patch_size" not in names and model.family != "monai" and data.roi_size is not None:
        patch_size = whole_patches(data.roi_size, PATCHES[0])
        model = dataclasses.replace(model, patch_size=patch_size)
    if "hidden_size" not in names:
        hidden_size = rounded_up(LEAST_HIDDEN_SIZE, min(max(1, model.num_heads), MAX_NUMBER))
        model = dataclasses.replace(model, hidden_size=hidden_size)
    elif "num_heads" not in names:
        model = dataclasses.replace(model, num_heads=1)
    return dataclasses.replace(cfg, data=data, model=model)
