"""A stand-in for a model, which needs no compiling."""

import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from unetr_flax.model.config import UNETRConfig


def tiny_config(out_channels: int) -> UNETRConfig:
    """Makes the configuration of a model whose weights take little time to write and read."""
    return UNETRConfig.reference(
        img_size=(16, 8, 16),
        in_channels=1,
        out_channels=out_channels,
        patch_size=8,
        hidden_size=8,
        mlp_dim=8,
        num_heads=2,
        num_layers=4,
        light_r=32,
    )


def fake_predictor(
    logits: Callable[[np.ndarray], np.ndarray],
    *,
    roi: tuple[int, ...] = (6, 5, 4),
    in_channels: int = 1,
    num_classes: int = 2,
    batch_size: int = 3,
) -> Any:
    """Builds what `Segmenter` takes for a `Predictor`: `logits` maps windows to logits."""

    class Fake(types.SimpleNamespace):
        def __call__(self, windows: np.ndarray) -> np.ndarray:
            return logits(windows)

    return Fake(
        roi=roi,
        in_channels=in_channels,
        num_classes=num_classes,
        batch_size=batch_size,
        device=jax.devices("cpu")[0],
    )


def brighter_than_half(windows: np.ndarray) -> np.ndarray:
    """Computes logits [b, *roi, 2] whose class is 1 where the first channel is above 0.5."""
    bright = windows[..., :1] - 0.5
    return np.concatenate([-bright, bright], axis=-1)
