"""Comparison of any two functions by their named intermediate values: is this port right?"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from unetr_flax.parity.causes import DEFINITIONS
from unetr_flax.parity.diagnose import Finding, explain_sites, told
from unetr_flax.parity.rows import TOLERANCE, Row, compare_arrays
from unetr_flax.parity.sites import Site
from unetr_flax.runtime.ending import one_line

Model = Callable[..., Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Step:
    """How one value is computed, so that a cause can be found where two sides differ.

    Attributes:
      value: name of the value.
      kind: its definition, a key of `unetr_flax.parity.causes.DEFINITIONS`, such as "layer_norm".
      inputs: the definition's inputs by the names of earlier values, or of inputs of the functions:
        {"x": "tokens"}.
      weights: the definition's weights, in PyTorch's layouts.
      right: settings of the definition, as they should be, such as {"epsilon": 1e-5}.
    """

    value: str
    kind: str
    inputs: Mapping[str, str]
    weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    right: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """The comparison of two functions.

    Attributes:
      rows: the comparison of each value that both have, in order.
      findings: the values that differ by themselves, and why.
      notes: values that only one function has, or in another shape.
    """

    rows: list[Row]
    findings: list[Finding]
    notes: list[str]

    @property
    def ok(self) -> bool:
        """True if all values agree up to rounding."""
        return not self.notes and all(row.ok for row in self.rows)

    def __str__(self) -> str:
        within = sum(row.ok for row in self.rows)
        lines = [f"{within} of {len(self.rows)} values agree"]
        failed = [row for row in self.rows if not row.ok]
        if failed:
            first = failed[0]
            lines[0] += (
                f"; {first.name} is the first that differs, by {first.relative:.1e} in "
                f"{first.dtype} ({first.tolerance:.0e} allowed)"
            )
        return "\n  ".join([*lines, *told(self.findings), *self.notes])


def compare(
    fn_a: Model,
    fn_b: Model,
    inputs: Mapping[str, Any],
    *,
    steps: Sequence[Step] = (),
    names: tuple[str, str] = ("a", "b"),
) -> Report:
    """Compares two functions by the values that they return.

    Each returns its intermediate values and results by name, in the order in which it computes
    them, as arrays of numpy or jax or as tensors, in the same layouts. A value with a `Step` is
    judged on its own function's inputs, so that an earlier difference does not count again. Of the
    others only the first value of all that differs is judged.

    Args:
      fn_a: a function of `inputs` by keyword, the port, say.
      fn_b: the other one, the original, say.
      inputs: arguments of both; arrays and tensors are copied for each.
      steps: how the values are computed.
      names: names of the two in the report.

    Raises:
      ValueError: if the functions have no value in common, if a value is neither float64 nor
        float32 nor integers, or if a step names an unknown definition or value or cannot be
        computed.
    """
    a, b = (
        _arrays(fn(**_copied(inputs)), name) for fn, name in zip((fn_a, fn_b), names, strict=True)
    )
    common = [name for name in b if name in a]
    if not common:
        raise ValueError(f"no value in common: {', '.join(a) or 'none'}; {', '.join(b) or 'none'}")
    by_value = _checked(steps, common, inputs)
    named = {name for step in steps for name in step.inputs.values() if name not in common}
    given = {name: _array(inputs[name], f"input {name}") for name in named}
    notes = [
        f"{name}: only {side} has it"
        for side, own, other in ((names[0], a, b), (names[1], b, a))
        for name in own
        if name not in other
    ]
    rows, findings, agree = [], [], True
    for name in common:
        pair = a[name], b[name]
        if note := _unlike(name, pair, names):
            notes.append(note)
        else:
            rows.append(compare_arrays("values", name, *pair))
        differs = bool(note) or not rows[-1].ok
        if name in by_value:
            sites = _sites(by_value[name], {**given, **a}, {**given, **b})
        else:
            sites = (
                [Site(name, "", "value", {"x": b[name]}, {}, *pair)] if differs and agree else []
            )
        dtype = "float32" if any(array.dtype == np.float32 for array in pair) else "float64"
        findings += explain_sites(sites, dtype, names)
        agree = agree and not differs
    return Report(rows, findings, notes)


def assert_parity(
    fn_a: Model,
    fn_b: Model,
    inputs: Mapping[str, Any],
    *,
    steps: Sequence[Step] = (),
    names: tuple[str, str] = ("a", "b"),
) -> None:
    """Fails with the report if two functions differ; takes the arguments of `compare`.

    Raises:
      AssertionError: if they do.
    """
    report = compare(fn_a, fn_b, inputs, steps=steps, names=names)
    assert report.ok, str(report)


def _copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Copies arrays and tensors, as a function may change its arguments in place."""
    copies = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            copies[name] = value.clone()
        else:
            copies[name] = value.copy() if isinstance(value, np.ndarray) else value
    return copies


def _unlike(name: str, pair: tuple[np.ndarray, np.ndarray], names: tuple[str, str]) -> str:
    """Says how the kinds of two arrays differ; "" if they do not."""
    for what in ("shape", "dtype"):
        a, b = (getattr(array, what) for array in pair)
        if a != b:
            return f"{name}: {what} {a} in {names[0]}, {b} in {names[1]}"
    return ""


def _sites(step: Step, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Site]:
    """Returns the step's value with what it is computed from; nothing if inputs differ in shape.

    Raises:
      ValueError: if the step cannot be computed.
    """
    if any(a[name].shape != b[name].shape for name in step.inputs.values()):
        return []
    weights = {
        name: _array(value, f"step {step.value!r}, weight {name}")
        for name, value in step.weights.items()
    }
    ours = {key: a[name] for key, name in step.inputs.items()}
    theirs = {key: b[name] for key, name in step.inputs.items()}
    arrays = {**weights, **theirs}
    try:
        # Copies, as arrays of jax are read-only and tensors cannot be.
        tensors = {name: torch.tensor(array).double() for name, array in arrays.items()}
        DEFINITIONS[step.kind].compute(tensors, **step.right)
    except (TypeError, LookupError, RuntimeError, ValueError) as error:
        told = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"step {step.value!r}, kind {step.kind!r}: {told}") from error
    value = step.value
    return [Site(value, "", step.kind, arrays, step.right, a[value], b[value], own=ours)]


def _checked(
    steps: Iterable[Step], common: Sequence[str], inputs: Mapping[str, Any]
) -> dict[str, Step]:
    """Returns the steps by their values.

    Raises:
      ValueError: if a step is not known, or one of its values is not there.
    """
    by_value: dict[str, Step] = {}
    for step in steps:
        if step.kind not in DEFINITIONS:
            known = ", ".join(DEFINITIONS)
            raise ValueError(f"step {step.value!r}, kind {step.kind!r}: must be one of {known}")
        if step.value in by_value:
            raise ValueError(f"step {step.value!r}: there are two, there must be one")
        for name in (step.value, *step.inputs.values()):
            if name not in common and (name == step.value or name not in inputs):
                raise ValueError(f"step {step.value!r}: no value {name!r} in both functions")
        by_value[step.value] = step
    return by_value


def _arrays(values: Any, side: str) -> dict[str, np.ndarray]:
    """Returns what a function returned as arrays.

    Raises:
      ValueError: if it is not by name, or has a value that cannot be compared.
    """
    if not isinstance(values, Mapping):
        kind = type(values).__name__
        raise ValueError(f"{side} returns {kind}, must return its values by name, as a dict")
    return {name: _array(value, f"{name} in {side}") for name, value in values.items()}


def _array(value: Any, what: str) -> np.ndarray:
    """Returns an array or tensor as a numpy array, integers and truth values in float64.

    Raises:
      ValueError: if it is of another dtype, or empty.
    """
    value = value.detach().cpu() if isinstance(value, torch.Tensor) else np.asarray(value)
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in TOLERANCE and not dtype.startswith(("int", "uint", "bool")):
        raise ValueError(f"{what}: {dtype}, must be {' or '.join(TOLERANCE)}, or integers")
    if 0 in value.shape:
        raise ValueError(f"{what}: shape {tuple(value.shape)} has no numbers")
    array = np.asarray(value)
    return array if dtype in TOLERANCE else array.astype(np.float64)
