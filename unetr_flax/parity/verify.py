"""Comparison of a checkpoint's PyTorch model and its port on the same input."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.activations import activation_rows, compile_evaluation
from unetr_flax.parity.diagnose import Finding, diagnose
from unetr_flax.parity.rows import TOLERANCE, Row, worst_of
from unetr_flax.parity.torch_models import check_installed
from unetr_flax.parity.twins import Twins, make_twins, precise
from unetr_flax.weights import from_torch

VOLUME = ", volume"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the models are compared on, and which PyTorch model.

    Attributes:
      volume: images [b, *img_size, in_channels] to compare on too; the rungs of their rows end in
        ", volume".
      batch: random images to compare on.
      seed: seed of the random images.
      torch_model: somebody's own model, with the weights that it shall have, instead of the
        original.
      prefix: prefix of the names that the family's modules have in it.
    """

    volume: np.ndarray | None = None
    batch: int = 2
    seed: int = 0
    torch_model: torch.nn.Module | None = None
    prefix: str = ""


def verify(cfg: UNETRConfig, state_dict: Mapping[str, Any], inputs: Inputs = Inputs()) -> list[Row]:
    """Compares every module, the skip features, attention maps, decoder stages and logits.

    Both models get the weights of the state dict, in float64 and then in float32.

    Args:
      cfg: the model's configuration.
      state_dict: its weights, as for `from_torch`.
      inputs: what they are compared on.

    Raises:
      WeightsError: if the state dict does not fit the configuration.
      TorchModelError: if the PyTorch model is not installed, or does not take the weights.
      ValueError: if the volume has another shape.
    """
    expected = (*cfg.img_size, cfg.in_channels)
    volume = inputs.volume
    if volume is not None and (volume.ndim != len(expected) + 1 or volume.shape[1:] != expected):
        raise ValueError(f"volume: shape {volume.shape}, must be (batch, {str(expected)[1:]}")
    # What does not fit or is missing is told before the long work.
    from_torch(state_dict, cfg)
    if inputs.torch_model is None:
        check_installed(cfg)
    batches = {inputs.batch} if volume is None else {inputs.batch, len(volume)}
    # Compiling takes as long as importing PyTorch's model and making both, which goes on meanwhile.
    programs = {
        (dtype, batch): compile_evaluation(cfg, dtype, batch)
        for dtype in TOLERANCE
        for batch in batches
    }
    rows = []
    with precise():
        for dtype in TOLERANCE:
            twins = _twins(cfg, state_dict, inputs, dtype)
            rows += activation_rows(twins, evaluate=programs[dtype, inputs.batch])
            if volume is not None:
                twins = dataclasses.replace(twins, image=volume.astype(dtype))
                found = activation_rows(twins, evaluate=programs[dtype, len(volume)])
                rows += [dataclasses.replace(row, rung=f"{row.rung}{VOLUME}") for row in found]
    return rows


def explain(
    cfg: UNETRConfig, state_dict: Mapping[str, Any], rows: list[Row], inputs: Inputs = Inputs()
) -> tuple[list[Finding], str]:
    """Finds out why a comparison does not hold.

    Args:
      cfg: the configuration, as for `verify`.
      state_dict: the weights, as for `verify`.
      rows: the result of `verify`.
      inputs: the same as for `verify`.

    Returns:
      The modules that differ on equal inputs, in forward order; and, where there are none, what
      that means, else "".
    """
    failed = [row for row in rows if not row.ok]
    # Float64 shows causes that float32's rounding would hide.
    dtype = "float64" if any(row.dtype == "float64" for row in failed) else "float32"
    with precise():
        twins = _twins(cfg, state_dict, inputs, dtype)
        plain = any(row.dtype == dtype and not row.rung.endswith(VOLUME) for row in failed)
        if inputs.volume is not None and not plain:
            twins = dataclasses.replace(twins, image=inputs.volume.astype(dtype))
        findings = diagnose(twins, sides=("Flax", "the module" if twins.own else "PyTorch"))
    return findings, "" if findings else summed_up(rows)


def summed_up(rows: list[Row]) -> str:
    """Says what it means that models differ, but none of their modules does on equal inputs."""
    failed = [row for row in rows if not row.ok]
    if any(row.dtype == "float64" for row in failed):
        return "every module holds on equal inputs; no known cause explains the difference"
    wide = max((row.relative for row in rows if row.dtype == "float64"), default=float("nan"))
    worst = worst_of(failed)
    return (
        f"accumulated float32 rounding: {worst.name} differs by {worst.relative:.1e}, but every "
        f"module holds alone on equal inputs, and in float64 all agree within {wide:.1e}"
    )


def _twins(cfg: UNETRConfig, state_dict: Mapping[str, Any], inputs: Inputs, dtype: str) -> Twins:
    # The module is copied, as the twins' change of dtype would stay in it.
    own = None if inputs.torch_model is None else copy.deepcopy(inputs.torch_model)
    return make_twins(
        cfg,
        dtype,
        batch=inputs.batch,
        seed=inputs.seed,
        state_dict=state_dict,
        torch_model=own,
        prefix=inputs.prefix,
    )
