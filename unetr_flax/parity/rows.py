"""Comparison of two arrays: their difference, and whether it is only rounding."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

# Largest max|a - b| / max|b| that counts as rounding.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison of the Flax side with the PyTorch side.

    Attributes:
      rung: kind of the comparison, such as "activations" or "gradients".
      name: PyTorch name of the array.
      shape: its shape on the PyTorch side.
      dtype: "float32" or "float64".
      max_abs: max|a - b|.
      relative: max|a - b| / scale, where scale is max|b| or that of `relative_to`.
      ulps: max|a - b| in units of the last place of scale.
      tolerance: largest `relative` that passes.
      relative_to: name of the array whose largest number is the scale; "" for b itself.
    """

    rung: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    max_abs: float
    relative: float
    ulps: float
    tolerance: float
    relative_to: str = ""

    @property
    def ok(self) -> bool:
        """True if the difference is within the tolerance; never true for nan."""
        return self.relative <= self.tolerance


def compare_arrays(
    rung: str,
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    *,
    beside: tuple[str, np.ndarray] | None = None,
) -> Row:
    """Compares two arrays of one shape and dtype.

    Args:
      rung: kind of comparison.
      name: name of the arrays.
      ours: Flax's array, in PyTorch's layout.
      theirs: PyTorch's array.
      beside: name and numbers of an array whose largest number differences are relative to,
        instead of max|theirs|; for values that are zero in exact arithmetic, whose rounding errors
        are of the size of other numbers.

    Raises:
      AssertionError: if shapes or dtypes differ, which no tolerance can excuse.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{rung} {name}: shapes {ours.shape} and {theirs.shape}"
    assert ours.dtype == theirs.dtype, f"{rung} {name}: dtypes {ours.dtype} and {theirs.dtype}"
    max_abs, scale = _largest(ours, theirs)
    relative_to = ""
    if beside is not None:
        relative_to, other = beside
        scale = float(np.abs(other).max())
    dtype = theirs.dtype.name
    return Row(
        rung=rung,
        name=name,
        shape=theirs.shape,
        dtype=dtype,
        max_abs=max_abs,
        relative=relative_difference(max_abs, scale),
        ulps=max_abs / float(np.spacing(theirs.dtype.type(scale))),
        tolerance=TOLERANCE[dtype],
        relative_to=relative_to,
    )


def relative_difference(max_abs: float, scale: float) -> float:
    """Divides a difference by a scale; one beside zeros counts as 1, and nan stays nan."""
    if scale or math.isnan(max_abs):
        return max_abs / (scale or 1.0)
    return float(max_abs > 0)


def worst_of(rows: Iterable[Row]) -> Row:
    """Returns the row with the largest difference for its tolerance; nan is the largest."""
    return max(rows, key=lambda row: (math.isnan(row.relative), row.relative / row.tolerance))


def _largest(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Returns max|ours - theirs| and max|theirs|, in parts that stay in the processor's cache."""
    if theirs.ndim < 4:
        parts = [(ours, theirs)]
    else:
        # Ours has the channels last in memory: parts of both along the first spatial axis are near.
        parts = zip(np.moveaxis(ours, 2, 0), np.moveaxis(theirs, 2, 0), strict=True)
    # np.max of a list keeps nan.
    found = [(np.abs(a - b).max(), np.abs(b).max()) for a, b in parts]
    max_abs, largest = np.max(found, axis=0)
    return float(max_abs), float(largest)


def assert_rows(rows: list[Row]) -> None:
    """Fails with every row that is not within its tolerance.

    Raises:
      AssertionError: also if there is nothing to compare.
    """
    assert rows, "nothing was compared"
    failed = [row for row in rows if not row.ok]
    lines = "\n".join(
        f"  {row.rung} {row.name} {row.shape} {row.dtype}: relative {row.relative:.2e} "
        f"> {row.tolerance:.0e} ({row.ulps:.3g} ULPs)"
        for row in failed
    )
    assert not failed, f"{len(failed)} of {len(rows)} comparisons differ:\n{lines}"
