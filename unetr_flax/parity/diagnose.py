"""Diagnosis of a comparison that does not hold: which modules differ, and why."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.causes import DEFINITIONS
from unetr_flax.parity.causes.explain import EXPLAINED, Reading, read, relative
from unetr_flax.parity.forced import run_forced
from unetr_flax.parity.places import ALL_PARTS, find_places, part_of, parts_of
from unetr_flax.parity.record import Recording, record
from unetr_flax.parity.sites import Site, find_sites
from unetr_flax.parity.twins import Twins, channels_first
from unetr_flax.weights import to_torch

# Names of the two models in findings.
SIDES = ("Flax", "PyTorch")

NOT_COMPARED = "not compared"

# PyTorch's default weight of a batch's statistics.
BATCH_NORM_MOMENTUM = 0.1


@dataclasses.dataclass(frozen=True)
class Finding:
    """A module that differs on equal inputs.

    Attributes:
      name: PyTorch name of the module.
      what: what in it or before it differs, "" for the module's own map.
      dtype: "float64" or "float32".
      seen: the difference in words.
      cause: the cause in words, with the model that has it; None if none is known.
      left: the difference that is left with the cause taken into account.
      numbers: shape and sizes of both values, for the case that nothing explains them.
    """

    name: str
    what: str
    dtype: str
    seen: str
    cause: str | None
    left: float
    numbers: str

    def __str__(self) -> str:
        name = f"{self.name}, {self.what}" if self.what else self.name
        if self.seen == NOT_COMPARED:
            return f"{name}: {self.seen}, {self.numbers}"
        if self.cause is None:
            return f"{name}: {self.seen}; no known cause explains it ({self.numbers})"
        return f"{name}: {self.seen}; explained by {self.cause} (then {self.left:.1e})"


def diagnose(
    twins: Twins,
    mask: np.ndarray | None = None,
    *,
    train: bool = False,
    sides: tuple[str, str] = SIDES,
) -> list[Finding]:
    """Compares both models module by module on equal inputs, and names the causes.

    Args:
      twins: both models; call within `precise()`.
      mask: boolean attention mask [B, H, N, N], if both take one.
      train: whether both run in training mode, without dropout; running statistics are compared
        then, too.
      sides: names of the two models in the findings.

    Returns:
      The modules that differ by themselves, in forward order.
    """
    state = to_torch(twins.variables, twins.cfg)
    if train:
        # The running statistics of the copy change.
        model = copy.deepcopy(twins.torch_model).train()
        twins = dataclasses.replace(twins, torch_model=model)
    findings = []
    # Running statistics change in each run, so in training mode there is only one.
    for parts in [ALL_PARTS] if train else parts_of(twins.cfg, len(twins.image)):
        findings += _diagnose_parts(twins, mask, train, sides, state, parts)
    order = _forward_order(twins.cfg)
    return sorted(findings, key=lambda finding: order.get(finding.name, len(order)))


def _diagnose_parts(
    twins: Twins,
    mask: np.ndarray | None,
    train: bool,
    sides: tuple[str, str],
    state: dict[str, np.ndarray],
    parts: frozenset[str],
) -> list[Finding]:
    """Diagnoses some parts of the models; only their arrays are held."""
    theirs = record(twins, mask, parts)
    ours, statistics = run_forced(twins, theirs, mask, train=train, parts=parts)
    options = {"mask": mask, "train": train, "parts": parts}
    sites = find_sites(twins.cfg, channels_first(twins.image), ours, theirs, state, **options)
    findings = explain_sites(sites, twins.dtype, sides) + _not_run(twins, theirs, sides[1], parts)
    if train:
        sites = _statistics_sites(twins, theirs, state, statistics)
        findings += explain_sites(sites, twins.dtype, sides)
    return findings


def _statistics_sites(
    twins: Twins, theirs: Recording, state: dict[str, np.ndarray], statistics: Any
) -> list[Site]:
    """Makes the sites of the running statistics after one batch."""
    ours = to_torch({**twins.variables, "batch_stats": statistics}, twins.cfg)
    after = {n: v.numpy() for n, v in twins.torch_model.state_dict().items()}
    sites = []
    for path, place in find_places(twins.cfg)[0].items():
        names = [f"{place.name}.running_{kind}" for kind in ("mean", "var")]
        if path in theirs.inputs and all(twins.prefix + name in after for name in names):
            mean, var = (state[name] for name in names)
            arrays = {"x": theirs.inputs[path], "mean": mean, "var": var}
            updated, right = _bare(after, twins), {"momentum": BATCH_NORM_MOMENTUM}
            sites.append(
                Site(
                    place.name,
                    "running statistics",
                    "running_statistics",
                    arrays,
                    right,
                    ours=np.stack([ours[name] for name in names]),
                    theirs=np.stack([updated[name] for name in names]),
                )
            )
    return sites


def _bare(state: dict[str, np.ndarray], twins: Twins) -> dict[str, np.ndarray]:
    return {name.removeprefix(twins.prefix): value for name, value in state.items()}


def _not_run(twins: Twins, theirs: Recording, side: str, parts: frozenset[str]) -> list[Finding]:
    """Finds the modules that the PyTorch model has not called, so that they were not compared."""
    leaves, _ = find_places(twins.cfg)
    return [
        Finding(
            name=place.name,
            what="",
            dtype=twins.dtype,
            seen=NOT_COMPARED,
            cause=None,
            left=float("nan"),
            numbers=f"{side} never calls this module",
        )
        for path, place in leaves.items()
        if path not in theirs.outputs and part_of(path) in parts
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


def told(findings: list[Finding]) -> list[str]:
    """Puts findings into lines, modules of the same cause into one, in forward order."""
    groups: dict[tuple[str, str | None], list[Finding]] = {}
    for finding in findings:
        key = (finding.what, finding.cause) if finding.cause else (finding.name, finding.numbers)
        groups.setdefault(key, []).append(finding)
    lines = []
    for first, *others in groups.values():
        line = str(first)
        if others:
            names = _listed([finding.name for finding in others])
            line += f"; the same in {len(others)} more: {names}"
        lines.append(line)
    return lines


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[: most - 1])}, ..."


def explain_sites(
    sites: Iterable[Site], dtype: str, sides: tuple[str, str] = SIDES
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
        readings = [
            read(definition, _tensors(arrays), site.right, value, dtype)
            for arrays, value in (({**site.arrays, **site.own}, ours), (site.arrays, theirs))
        ]
        if all(reading is not None and not reading.text for reading in readings):
            # Both computed it as defined, but from values that already differ.
            continue
        cause, left = _told(readings, sides)
        findings.append(
            Finding(
                name=site.name,
                what=site.what,
                dtype=dtype,
                seen=_seen(site, difference, sides),
                cause=cause,
                left=left,
                numbers=_numbers(site, sides),
            )
        )
    return findings


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


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


def _seen(site: Site, difference: float, sides: tuple[str, str]) -> str:
    """Puts the difference of a site's values into words."""
    values = (site.ours, site.theirs)
    if np.shape(site.ours) != np.shape(site.theirs):
        return "another shape"
    not_finite = [s for s, v in zip(sides, values, strict=True) if not np.isfinite(v).all()]
    if not_finite:
        return f"numbers that are not finite in {' and '.join(not_finite)}"
    return f"differs by {difference:.1e}"


def _numbers(site: Site, sides: tuple[str, str]) -> str:
    shape = "x".join(map(str, np.shape(site.theirs)))
    told = []
    for side, value in zip(sides, (site.ours, site.theirs), strict=True):
        told.append(f"{side} mean {value.mean():.3e}, deviation {value.std():.3e}")
    return f"{shape}; {'; '.join(told)}"
