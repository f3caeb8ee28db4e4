"""What a comparison found, for a person at a terminal."""

import math

from rich import box
from rich.console import Console
from rich.table import Table

from unetr_flax.parity.compare import TOLERANCE, Row

# PyTorch modules that hold the encoder; all others are the decoder's parts.
ENCODERS = ("transformer", "vit")


def print_table(rows: list[Row], console: Console | None = None) -> None:
    """One line per block of the model, and at last one that counts what is within tolerance.

    Args:
      rows: comparisons in any of the dtypes that there are tolerances for.
      console: where to print; standard output if None.
    """
    console = console or Console()
    table = Table(
        title="max|flax - torch| / max|torch|",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("what", no_wrap=True)
    table.add_column("rows", justify="right")
    for dtype, tolerance in TOLERANCE.items():
        table.add_column(f"{dtype}\n<= {tolerance:.0e}", justify="right")
        table.add_column("ULPs", justify="right")
    table.add_column("holds")
    for line in lines(rows):
        table.add_row(*line, style=None if line[-1] == "yes" else "red")
    console.print(table)
    within = sum(row.ok for row in rows)
    console.print(f"{within} of {len(rows)} comparisons within tolerance", highlight=False)


def lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """What is compared, how often, the worst error of each dtype and its ULPs, whether all hold."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(row)
    found = []
    for name, group in groups.items():
        line = [name, str(len(group))]
        for dtype in TOLERANCE:
            of_dtype = [row for row in group if row.dtype == dtype]
            worst = max(
                of_dtype, key=lambda r: (r.relative != r.relative, r.relative), default=None
            )
            line += ["", ""] if worst is None else [f"{worst.relative:.1e}", f"{worst.ulps:.0f}"]
        found.append((*line, "yes" if all(row.ok for row in group) else "NO"))
    return found


def _badness(row: Row) -> float:
    return math.inf if math.isnan(row.relative) else row.relative


def _group(row: Row) -> str:
    """The block of the model that a module is in, "vit.blocks.3"; other comparisons by kind."""
    rung, comma, condition = row.rung.partition(", ")
    if rung != "activations":
        return row.rung
    outer, *inner = row.name.split(".")
    if outer in ENCODERS:
        outer = ".".join([outer, inner[0], *(part for part in inner[1:2] if part.isdigit())])
    return outer + comma + condition
