"""Comparison of a checkpoint's PyTorch model and its port on the same input."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.activations import activation_rows
from unetr_flax.parity.rows import TOLERANCE, Row
from unetr_flax.parity.twins import make_twins, precise


def verify(
    cfg: UNETRConfig,
    state_dict: Mapping[str, Any],
    *,
    volume: np.ndarray | None = None,
    batch: int = 2,
    seed: int = 0,
) -> list[Row]:
    """Compares every module, the skip features, attention maps, decoder stages and logits.

    Both models get the weights of the state dict, in float64 and then in float32.

    Args:
      cfg: the model's configuration.
      state_dict: its weights, as for `from_torch`.
      volume: images [b, *img_size, in_channels] to compare on too; the rungs of their rows end in
        ", volume".
      batch: random images to compare on.
      seed: seed of the random images.

    Raises:
      WeightsError: if the state dict does not fit the configuration.
      TorchModelError: if the PyTorch model is not installed, or does not take the weights.
      ValueError: if the volume has another shape.
    """
    expected = (*cfg.img_size, cfg.in_channels)
    if volume is not None and (volume.ndim != len(expected) + 1 or volume.shape[1:] != expected):
        raise ValueError(f"volume: shape {volume.shape}, must be (batch, {str(expected)[1:]}")
    rows = []
    with precise():
        for dtype in TOLERANCE:
            twins = make_twins(cfg, dtype, batch=batch, seed=seed, state_dict=state_dict)
            rows += activation_rows(twins)
            if volume is not None:
                found = activation_rows(dataclasses.replace(twins, image=volume.astype(dtype)))
                rows += [dataclasses.replace(row, rung=f"{row.rung}, volume") for row in found]
    return rows
