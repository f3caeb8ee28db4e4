"""Reports of the ladder's comparisons: tables for terminal and Markdown, JSON and a plot."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import torch
from matplotlib.figure import Figure
from rich.table import Table

from unetr_flax import UNETRConfig
from unetr_flax.parity.rows import TOLERANCE, Row

DTYPES = ("float64", "float32")


def versions() -> str:
    """Describes the machine and the libraries that produced the numbers."""
    return (
        f"jax {jax.__version__}, flax {flax.__version__}, torch {torch.__version__}, "
        f"{jax.default_backend()}, {platform.machine()}, Python {platform.python_version()}"
    )


def _worst(rows: list[Row]) -> Row:
    return max(rows, key=lambda row: row.relative)


def _summary(rows: list[Row]) -> list[tuple[str, ...]]:
    """Makes a line per rung and dtype: number of comparisons, the worst, its tolerance."""
    lines = []
    for dtype in DTYPES:
        of_dtype = [row for row in rows if row.dtype == dtype]
        for rung in dict.fromkeys(row.rung for row in of_dtype):
            found = [row for row in of_dtype if row.rung == rung]
            worst = _worst(found)
            lines.append(
                (
                    rung,
                    dtype,
                    str(len(found)),
                    f"{worst.relative:.1e}",
                    f"{worst.ulps:.1f}",
                    worst.name,
                    f"{worst.tolerance:.0e}",
                    "yes" if all(row.ok for row in found) else "NO",
                )
            )
    return lines


SUMMARY_HEADER = ("what", "dtype", "compared", "worst", "ULPs", "where", "tolerance", "holds")


def summary_table(rows: list[Row]) -> Table:
    """Makes the summary for the terminal."""
    table = Table(title="parity: max|a - b| / max|b|")
    for name in SUMMARY_HEADER:
        figures = name in ("compared", "worst", "ULPs")
        table.add_column(name, justify="right" if figures else "left", overflow="fold")
    for line in _summary(rows):
        table.add_row(*line)
    return table


def markdown(rows: list[Row], title: str, why: Sequence[str] = ()) -> str:
    """Writes the whole report: summary, causes, then every comparison in both dtypes.

    Args:
      rows: the comparisons.
      title: what was compared.
      why: lines that say which modules differ, and for which causes.
    """
    parts = [f"# Parity of the Flax UNETR with PyTorch\n\n{title}\n\n{versions()}\n"]
    parts.append(_markdown_table(SUMMARY_HEADER, _summary(rows)))
    if why:
        parts.append("\n## Why it differs\n\n" + "\n".join(f"- {line}" for line in why) + "\n")
    header = ("what", "shape")
    header += tuple(
        f"{name} {dtype}" for dtype in DTYPES for name in ("max abs", "relative", "ULPs")
    )
    for rung in dict.fromkeys(row.rung for row in rows):
        by_name: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row.rung == rung:
                by_name.setdefault(row.name, {})[row.dtype] = row
        lines = []
        for name, found in by_name.items():
            shape = "x".join(map(str, next(iter(found.values())).shape)) or "scalar"
            line = [name, shape]
            for dtype in DTYPES:
                row = found.get(dtype)
                line += ["", "", ""] if row is None else _figures(row)
            lines.append(tuple(line))
        parts.append(f"\n## {rung}\n\n{_markdown_table(header, lines)}")
    return "\n".join(parts)


def as_json(rows: list[Row], cfg: UNETRConfig, why: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the report as values that JSON can hold; arguments as in `markdown`."""
    return {
        "versions": versions(),
        "config": cfg.to_dict(),
        "why": list(why),
        "rows": [{**vars(row), "ok": row.ok} for row in rows],
    }


def plot(rows: list[Row], path: Path) -> None:
    """Plots the error of every module's output against its depth; lines are the tolerances."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for dtype, color in zip(DTYPES, ("tab:blue", "tab:orange"), strict=True):
        errors = [r.relative for r in rows if r.dtype == dtype and r.rung == "activations"]
        axes.plot(errors, ".-", color=color, label=dtype, linewidth=0.8, markersize=4)
        axes.axhline(TOLERANCE[dtype], color=color, linestyle="--", linewidth=1)
        axes.annotate(f"tolerance {dtype}", (0, TOLERANCE[dtype]), color=color, va="bottom")
    names = [r.name for r in rows if r.dtype == DTYPES[0] and r.rung == "activations"]
    step = max(1, len(names) // 24)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel("max|flax - torch| / max|torch|")
    axes.set_title("Output of every module, in order of depth")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=150)


def _figures(row: Row) -> list[str]:
    return [f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.ulps:.1f}"]


def _markdown_table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rule = "|".join(" --- " for _ in header)
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"| {' | '.join(header)} |\n|{rule}|\n{body}\n"
