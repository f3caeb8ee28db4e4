"""Small models with the family and options of a large one, for rungs that run a model often."""

import dataclasses

from unetr_flax import UNETRConfig

HEAD_SIZE = 8
CHANNELS = 4


def small(cfg: UNETRConfig) -> UNETRConfig:
    """Makes a configuration of the same depth with few patches and narrow features."""
    # The axes differ, so that an exchange of two is noticed.
    return _narrow(cfg, (2, 1, 3), cfg.patch_size)


def tiny(cfg: UNETRConfig) -> UNETRConfig:
    """Makes a configuration with few voxels and blocks, to be trained for many steps.

    MONAI's models have a fixed depth and fixed patches, so theirs stay larger.
    """
    if cfg.family == "monai":
        return _narrow(cfg, (1, 1, 2), cfg.patch_size)
    narrow = _narrow(cfg, (2, 1, 3), tuple(min(size, 4) for size in cfg.patch_size))
    return dataclasses.replace(narrow, num_layers=4, skip_layers=(1, 2, 3, 4))


def _narrow(cfg: UNETRConfig, grid: tuple[int, ...], patch_size: tuple[int, ...]) -> UNETRConfig:
    hidden_size = min(cfg.hidden_size, HEAD_SIZE * cfg.num_heads)
    width = min(cfg.channels[0], CHANNELS)
    return dataclasses.replace(
        cfg,
        img_size=tuple(n * size for n, size in zip(grid, patch_size, strict=False)),
        patch_size=patch_size,
        hidden_size=hidden_size,
        mlp_dim=min(cfg.mlp_dim, 4 * hidden_size),
        channels=tuple(width * 2**i for i in range(len(cfg.channels))),
    )
