"""Keys that versions of the PyTorch models write, but never apply."""

import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.families import family_of


def unused_keys(cfg: UNETRConfig, version: str | None = None) -> dict[str, np.ndarray]:
    """Returns what a version's state dict holds beside the weights that the model applies.

    Args:
      cfg: the model's configuration.
      version: version of the author's code, such as "1.5" of MONAI; the latest if None.

    Returns:
      float32 arrays by key: ones for scales, zeros for shifts, identity matrices for maps.

    Raises:
      ValueError: if there is no such version, or the family has no versions.
    """
    family = family_of(cfg)
    if version is not None and not family.versions:
        raise ValueError(f"version {version}: family {cfg.family!r} has no versions")
    return family.unused_keys(cfg, version)


def known_unused(cfg: UNETRConfig) -> set[str]:
    """Returns every key that some version of the model writes and none applies."""
    versions = family_of(cfg).versions or (None,)
    return {key for version in versions for key in unused_keys(cfg, version)}
