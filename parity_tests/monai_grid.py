"""Command line: `python -m parity_tests.monai_grid` compares the whole grid of MONAI's options."""

import sys

from parity_tests.gradients import evaluation_rows
from parity_tests.monai_configs import ALL, DIFFERENCES
from unetr_flax import UNETRConfig
from unetr_flax.parity.activations import activation_rows
from unetr_flax.parity.rows import Row
from unetr_flax.parity.twins import make_twins, precise

HEADER = (
    "configuration",
    "differs in",
    "compared",
    "forward, float64",
    "gradients, float64",
    "forward, float32",
    "holds",
)


def grid_rows(name: str, dtype: str) -> list[Row]:
    """Compares forward passes and, in float64, gradients of the configuration with this name."""
    with precise():
        twins = make_twins(UNETRConfig.monai(**ALL[name]), dtype)
        return evaluation_rows(twins) if dtype == "float64" else activation_rows(twins)


def table_line(name: str, rows: list[Row]) -> str:
    """Formats one line of the table: the worst of each kind of comparison of a configuration."""
    forward = [row for row in rows if row.rung != "gradients"]
    kinds = (
        [row for row in forward if row.dtype == "float64"],
        [row for row in rows if row.rung == "gradients"],
        [row for row in forward if row.dtype == "float32"],
    )
    options = ", ".join(f"`{key}={value!r}`" for key, value in DIFFERENCES[name].items())
    worst = (f"{max(row.relative for row in kind):.1e}" for kind in kinds)
    holds = "yes" if all(row.ok for row in rows) else "NO"
    return f"| {' | '.join((name, options, str(len(rows)), *worst, holds))} |"


def main() -> int:
    """Prints the table in Markdown, line by line; returns 1 if a comparison is too far off."""
    print(f"| {' | '.join(HEADER)} |\n|{'|'.join(' --- ' for _ in HEADER)}|")
    total, within = 0, 0
    for name in ALL:
        rows = [row for dtype in ("float64", "float32") for row in grid_rows(name, dtype)]
        total, within = total + len(rows), within + sum(row.ok for row in rows)
        print(table_line(name, rows), flush=True)
    print(f"\n{within} of {total} comparisons within tolerance")
    return 0 if within == total else 1


if __name__ == "__main__":
    sys.exit(main())
