"""Comparison of two errors: ours beside PyTorch's, both against float64."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RatioRow:
    """One comparison of the Flax side's error with the PyTorch side's.

    Attributes:
      rung: kind of the comparison.
      name: what is judged.
      dtype: "bfloat16" or "float16".
      ours: mean of ||flax - exact|| / ||exact||.
      theirs: mean of ||torch - exact|| / ||exact||.
      tolerance: largest `ratio` that passes.
    """

    rung: str
    name: str
    dtype: str
    ours: float
    theirs: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """Our error as a multiple of theirs."""
        return self.ours / self.theirs if self.theirs else float("inf" if self.ours else 1)

    @property
    def ok(self) -> bool:
        """True if our error is within the tolerance; never true for nan.

        Beside results of PyTorch that are all error, ours prove nothing.
        """
        return self.ratio <= self.tolerance and self.theirs < 1
