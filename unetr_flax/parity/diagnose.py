"""Diagnosis of a comparison that does not hold: which modules differ, and why."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.causes import DEFINITIONS
from unetr_flax.parity.causes.explain import EXPLAINED, Reading, read, relative
from unetr_flax.parity.forced import run_forced
from unetr_flax.parity.places import find_places
from unetr_flax.parity.record import Recording, record
from unetr_flax.parity.sites import Site, find_sites
from unetr_flax.parity.twins import Twins, channels_first
from unetr_flax.weights import to_torch


@dataclasses.dataclass(frozen=True)
class Finding:
    """A module that differs on equal inputs.

    Attributes:
      name: PyTorch name of the module.
      what: what in it or before it differs, "" for the module's own map.
      dtype: "float64" or "float32".
      difference: max|ours - theirs| / max|theirs|.
      cause: the cause in words, with the model that has it; None if none is known.
      left: the difference that is left with the cause taken into account.
      numbers: shape and sizes of both values, for the case that nothing explains them.
    """

    name: str
    what: str
    dtype: str
    difference: float
    cause: str | None
    left: float
    numbers: str

    def __str__(self) -> str:
        name = f"{self.name}, {self.what}" if self.what else self.name
        told = f"{name}: differs by {self.difference:.1e}"
        if self.difference != self.difference:
            return f"{name}: not compared, {self.numbers}"
        if self.cause is None:
            return f"{told}; no known cause explains it ({self.numbers})"
        return f"{told}; explained by {self.cause} (then {self.left:.1e})"


def diagnose(
    twins: Twins, mask: np.ndarray | None = None, *, sides: tuple[str, str] = ("Flax", "PyTorch")
) -> list[Finding]:
    """Compares both models module by module on equal inputs, and names the causes.

    Args:
      twins: both models; call within `precise()`.
      mask: boolean attention mask [B, H, N, N], if both take one.
      sides: names of the two models in the findings.

    Returns:
      The modules that differ by themselves, in forward order.
    """
    state = to_torch(twins.variables, twins.cfg)
    theirs = record(twins.torch_model, twins.cfg, twins.image, mask)
    ours, _ = run_forced(twins, theirs, mask)
    image = channels_first(twins.image)
    sites = find_sites(twins.cfg, image, ours, theirs, state, mask=mask)
    findings = explain_sites(sites, twins.dtype, sides) + _not_run(twins, theirs, sides[1])
    order = _forward_order(twins.cfg)
    return sorted(findings, key=lambda finding: order.get(finding.name, len(order)))


def _not_run(twins: Twins, theirs: Recording, side: str) -> list[Finding]:
    """Finds the modules that the PyTorch model has not called, so that they were not compared."""
    leaves, _ = find_places(twins.cfg)
    return [
        Finding(
            name=place.name,
            what="",
            dtype=twins.dtype,
            difference=float("nan"),
            cause=None,
            left=float("nan"),
            numbers=f"{side} never calls this module",
        )
        for path, place in leaves.items()
        if path not in theirs.outputs
    ]


def _forward_order(cfg: UNETRConfig) -> dict[str, int]:
    """Returns the places of all modules in forward order, by PyTorch name; blocks come last."""
    leaves, blocks = find_places(cfg)
    paths = list(leaves)
    order = {place.name: index for index, place in enumerate(leaves.values())}
    for path, block in blocks.items():
        inside = [i for i, leaf in enumerate(paths) if leaf.startswith(f"{path}/")]
        order[block.name] = max(inside, default=len(paths))
    return order


def explain_sites(
    sites: Iterable[Site], dtype: str, sides: tuple[str, str] = ("Flax", "PyTorch")
) -> list[Finding]:
    """Explains those of the sites whose two values differ.

    Args:
      sites: sites in forward order.
      dtype: dtype of their values.
      sides: names of the two models.
    """
    findings = []
    for site in sites:
        ours, theirs = (
            torch.from_numpy(np.array(site.ours)),
            torch.from_numpy(np.array(site.theirs)),
        )
        difference = relative(ours.double(), theirs.double())
        if difference <= EXPLAINED[dtype]:
            continue
        definition = DEFINITIONS[site.kind]
        arrays = {k: torch.from_numpy(np.array(a)) for k, a in site.arrays.items()}
        readings = [read(definition, arrays, site.right, v, dtype) for v in (ours, theirs)]
        if all(reading is not None and not reading.text for reading in readings):
            # Both computed it as defined, but from values that already differ.
            continue
        cause, left = _told(readings, sides)
        findings.append(
            Finding(
                name=site.name,
                what=site.what,
                dtype=dtype,
                difference=difference,
                cause=cause,
                left=left,
                numbers=_numbers(site, sides),
            )
        )
    return findings


def _told(readings: list[Reading | None], sides: tuple[str, str]) -> tuple[str | None, float]:
    """Puts the causes of both sides into words."""
    parts, left = [], 0.0
    for reading, side in zip(readings, sides, strict=True):
        if reading is None:
            return None, float("nan")
        left = max(left, reading.difference)
        if reading.text:
            parts.append(f"{reading.text} in {side}")
    return " and ".join(parts), left


def _numbers(site: Site, sides: tuple[str, str]) -> str:
    shape = "x".join(map(str, np.shape(site.theirs)))
    told = []
    for side, value in zip(sides, (site.ours, site.theirs), strict=True):
        told.append(f"{side} mean {value.mean():.3e}, deviation {value.std():.3e}")
    return f"{shape}; {'; '.join(told)}"
