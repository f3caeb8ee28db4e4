"""The table of a comparison, for a person at a terminal."""

import re

from rich import box
from rich.console import Console
from rich.table import Table

from unetr_flax.parity.rows import TOLERANCE, Row, worst_of
from unetr_flax.weights.families import FAMILIES


def print_table(rows: list[Row], console: Console | None = None) -> None:
    """Prints a line for each block of the model, and a last line that counts what holds.

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
    """Returns the lines of the table.

    Args:
      rows: comparisons.

    Returns:
      For each block of the model, or other kind of comparison: its name, number of comparisons,
      worst error of each dtype and the same in ULPs, and whether all are within tolerance.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(row)
    found = []
    for name, group in groups.items():
        line = [name, str(len(group))]
        for dtype in TOLERANCE:
            of_dtype = [row for row in group if row.dtype == dtype]
            if of_dtype:
                worst = worst_of(of_dtype)
                line += [f"{worst.relative:.1e}", f"{worst.ulps:.0f}"]
            else:
                line += ["", ""]
        found.append((*line, "yes" if all(row.ok for row in group) else "NO"))
    return found


def _group(row: Row) -> str:
    """Returns the block of the model that a module is in, "vit.blocks.3"; other rungs by name."""
    rung, comma, condition = row.rung.partition(", ")
    if rung != "activations":
        return row.rung
    block = row.name.partition(".")[0]
    for family in FAMILIES.values():
        encoder = re.escape(family.torch_model.encoder)
        if found := re.match(rf"{encoder}\.[^.]+(\.\d+(?=\.|$))?", row.name):
            block = found[0]
    return block + comma + condition
