"""Comparison of any two functions by their named intermediate values: is this port right?"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unetr_flax.parity.causes import DEFINITIONS
from unetr_flax.parity.diagnose import Finding, explain_sites, told
from unetr_flax.parity.rows import TOLERANCE, Row, compare_arrays
from unetr_flax.parity.sites import Site

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
    judged on its own function's inputs, so that an earlier difference does not count again. Without
    steps, only the first value that differs can be judged.

    Args:
      fn_a: a function of `inputs` by keyword, the port, say.
      fn_b: the other one, the original, say.
      inputs: arguments of both.
      steps: how the values are computed.
      names: names of the two in the report.

    Raises:
      ValueError: if the functions have no value in common, or a step names an unknown definition or
        value.
    """
    values = [_numpy(fn(**inputs)) for fn in (fn_a, fn_b)]
    given = _numpy(inputs)
    a, b = values
    common = [name for name in b if name in a]
    if not common:
        raise ValueError(f"no value in common: {', '.join(a) or 'none'}; {', '.join(b) or 'none'}")
    by_value = {step.value: step for step in steps}
    _check(by_value, common, given)
    notes = [
        f"{name}: only {side} has it"
        for side, own, other in ((names[0], a, b), (names[1], b, a))
        for name in own
        if name not in other
    ]
    rows, sites = [], []
    for name in common:
        if a[name].shape != b[name].shape:
            notes.append(
                f"{name}: shape {a[name].shape} in {names[0]}, {b[name].shape} in {names[1]}"
            )
        elif a[name].dtype != b[name].dtype:
            notes.append(
                f"{name}: dtype {a[name].dtype} in {names[0]}, {b[name].dtype} in {names[1]}"
            )
        else:
            rows.append(compare_arrays("values", name, a[name], b[name]))
        if name in by_value:
            sites.append(_site(by_value[name], {**given, **a}, {**given, **b}))
        elif all(row.ok for row in rows[:-1]) and not sites:
            arrays = {"x": b[name]}
            sites.append(Site(name, "", "value", arrays, {}, a[name], b[name]))
    dtype = "float32" if any(b[name].dtype == np.float32 for name in common) else "float64"
    return Report(rows, explain_sites(sites, dtype, names), notes)


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


def _site(step: Step, a: Mapping[str, Any], b: Mapping[str, Any]) -> Site:
    weights = _numpy(step.weights)
    ours = {key: a[name] for key, name in step.inputs.items()}
    theirs = {key: b[name] for key, name in step.inputs.items()}
    return Site(
        step.value,
        "",
        step.kind,
        {**weights, **theirs},
        step.right,
        a[step.value],
        b[step.value],
        own=ours,
    )


def _check(steps: Mapping[str, Step], common: list[str], given: Mapping[str, Any]) -> None:
    for step in steps.values():
        if step.kind not in DEFINITIONS:
            known = ", ".join(DEFINITIONS)
            raise ValueError(f"step {step.value!r}, kind {step.kind!r}: must be one of {known}")
        for name in (step.value, *step.inputs.values()):
            if name not in common and name not in given:
                raise ValueError(f"step {step.value!r}: no value {name!r} in both functions")


def _numpy(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns arrays or tensors as numpy arrays, integers and such in float64."""
    arrays = {}
    for name, value in values.items():
        array = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        arrays[name] = array if array.dtype.name in TOLERANCE else array.astype(np.float64)
    return arrays
