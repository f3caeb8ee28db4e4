"""The report of a climb: what was compared, on what, and whether it holds; Markdown, JSON, plot."""

import dataclasses
import hashlib
import importlib.metadata
import io
import math
import platform
from collections.abc import Sequence
from typing import Any

import flax
import jax
import matplotlib
import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from parity_tests.ladder import AnyRow
from parity_tests.ratio_rows import RatioRow
from unetr_flax import UNETRConfig
from unetr_flax.parity.rows import TOLERANCE, Row, worst_of
from unetr_flax.parity.twins import Twins

DTYPES = ("float64", "float32")
SUMMARY_HEADER = ("what", "dtype", "compared", "worst", "ULPs", "where", "tolerance", "holds")
RATIO_HEADER = ("what", "dtype", "Flax", "PyTorch", "ratio", "at most", "holds")
PLOT = "error_by_depth.png"

Lines = list[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that was compared.

    Attributes:
      name: its role in the report.
      cfg: its configuration.
      weights: where its weights come from.
      weights_sha256: digest of PyTorch's state dict: names, shapes and numbers.
      image_sha256: digest of the batch's numbers.
    """

    name: str
    cfg: UNETRConfig
    weights: str
    weights_sha256: str
    image_sha256: str


def describe(name: str, twins: Twins, weights: str) -> Model:
    """Describes twins for the report."""
    digest = hashlib.sha256()
    for key, value in sorted(twins.torch_model.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.numpy().data)
    image = hashlib.sha256(twins.image.data).hexdigest()
    return Model(name, twins.cfg, weights, digest.hexdigest(), image)


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is reported.

    Attributes:
      models: the models that were compared.
      all_rows: the comparisons.
      why: lines that say which modules differ, and for which causes.
      left_out: lines that say which rungs were not climbed, and why.
      platform: where the Flax side ran.
    """

    models: Sequence[Model]
    all_rows: Sequence[AnyRow]
    why: Sequence[str] = ()
    left_out: Sequence[str] = ()
    platform: str = "cpu"

    @property
    def rows(self) -> list[Row]:
        """The comparisons of numbers."""
        return [row for row in self.all_rows if isinstance(row, Row)]

    @property
    def ratios(self) -> list[RatioRow]:
        """The comparisons of errors."""
        return [row for row in self.all_rows if isinstance(row, RatioRow)]

    @property
    def failed(self) -> list[AnyRow]:
        """The comparisons that are not within their tolerance."""
        return [row for row in self.all_rows if not row.ok]

    @property
    def status(self) -> int:
        """The exit status: 0 if all holds, 1 if not, 2 if nothing was compared."""
        return int(bool(self.failed)) if self.all_rows else 2

    @property
    def verdict(self) -> str:
        """One line: whether all holds."""
        word = ("HOLDS", "DIFFERS", "NOTHING COMPARED")[self.status]
        within = len(self.all_rows) - len(self.failed)
        counted = f"{within:,} of {len(self.all_rows):,} comparisons within tolerance"
        partly = f"; {len(self.left_out)} left out" if self.left_out else ""
        return f"{word}: {counted}{partly}"

    @property
    def versions(self) -> str:
        """The machine and the libraries that produced the numbers."""
        return (
            f"jax {jax.__version__} on {self.platform}, flax {flax.__version__}, "
            f"torch {torch.__version__}{_monai_version()}, {platform.machine()}, "
            f"Python {platform.python_version()}"
        )


def _monai_version() -> str:
    # Importing monai takes seconds.
    try:
        return f", monai {importlib.metadata.version('monai')}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def summary(rows: Sequence[Row]) -> Lines:
    """Makes a line per rung and dtype: number of comparisons, the worst, its tolerance."""
    lines = []
    for dtype in DTYPES:
        of_dtype = [row for row in rows if row.dtype == dtype]
        for rung in dict.fromkeys(row.rung for row in of_dtype):
            found = [row for row in of_dtype if row.rung == rung]
            worst = worst_of(found)
            lines.append(
                (
                    rung,
                    dtype,
                    str(len(found)),
                    f"{worst.relative:.1e}",
                    f"{worst.ulps:.1f}",
                    worst.name,
                    f"{worst.tolerance:.0e}",
                    _holds(found),
                )
            )
    return lines


def ratio_lines(rows: Sequence[RatioRow]) -> Lines:
    """Makes a line for each comparison of errors."""
    return [
        (
            row.name,
            row.dtype,
            f"{row.ours:.2e}",
            f"{row.theirs:.2e}",
            f"{row.ratio:.3f}",
            f"{row.tolerance}",
            _holds([row]),
        )
        for row in rows
    ]


def details(rows: Sequence[Row]) -> dict[str, tuple[tuple[str, ...], Lines]]:
    """Makes a table of every comparison for each rung: its header and its lines."""
    tables = {}
    for rung in dict.fromkeys(row.rung for row in rows):
        by_name: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row.rung == rung:
                by_name.setdefault(row.name, {})[row.dtype] = row
        dtypes = [d for d in DTYPES if any(d in found for found in by_name.values())]
        header = ("what", "shape")
        header += tuple(f"{name} {d}" for d in dtypes for name in ("max abs", "relative", "ULPs"))
        lines = []
        for name, found in by_name.items():
            beside = next(iter(found.values())).relative_to
            line = [f"{name}, beside {beside}" if beside else name]
            line += ["x".join(map(str, next(iter(found.values())).shape)) or "scalar"]
            for dtype in dtypes:
                row = found.get(dtype)
                line += (
                    [f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.ulps:.1f}"]
                    if row
                    else [""] * 3
                )
            lines.append(tuple(line))
        tables[rung] = header, lines
    return tables


def _holds(rows: Sequence[AnyRow]) -> str:
    return "yes" if all(row.ok for row in rows) else "NO"


def metric(rows: Sequence[Row]) -> str:
    """Says what the differences of these comparisons are relative to."""
    text = "The difference of two arrays is max|flax - torch| / max|torch|"
    if beside := sum(bool(row.relative_to) for row in rows):
        text += (
            f"; that of {beside} gradients which are zero in exact arithmetic is relative to the "
            "largest number of the gradient that is named beside them"
        )
    return f"{text}."


def console_tables(report: Report) -> list[Table]:
    """Makes the summary for the terminal."""
    tables = []
    for title, header, lines in (
        ("max|flax - torch| / max|torch|", SUMMARY_HEADER, summary(report.rows)),
        ("half precision: error of each against float64", RATIO_HEADER, ratio_lines(report.ratios)),
    ):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in header:
            words = name in ("what", "dtype", "where", "holds")
            table.add_column(name, justify="left" if words else "right", overflow="fold")
        for line in lines:
            table.add_row(*line, style=None if line[-1] == "yes" else "red")
        tables += [table] if lines else []
    return tables


def markdown(report: Report) -> str:
    """Writes the whole report: verdict, models, summary, causes, then every comparison."""
    parts = [f"# Parity of the Flax UNETR with PyTorch\n\n{report.verdict}\n\n{report.versions}\n"]
    for model in report.models:
        parts.append(
            f"{model.name}: {model.weights}, {settings(model.cfg)}; SHA-256 of the weights "
            f"{model.weights_sha256}, of the image {model.image_sha256}\n"
        )
    if report.rows:
        parts.append(f"{metric(report.rows)}\n")
        parts.append(_markdown_table(SUMMARY_HEADER, summary(report.rows)))
    if report.ratios:
        table = _markdown_table(RATIO_HEADER, ratio_lines(report.ratios))
        parts.append(f"\n## Half precision\n\n{table}")
    for title, lines in (("Why it differs", report.why), ("Left out", report.left_out)):
        if lines:
            parts.append(f"\n## {title}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    for rung, (header, lines) in details(report.rows).items():
        parts.append(f"\n## {rung}\n\n{_markdown_table(header, lines)}")
    return "\n".join(parts)


def settings(cfg: UNETRConfig) -> str:
    """Formats a configuration in one line."""
    return ", ".join(f"{name}={value}" for name, value in cfg.to_dict().items())


def as_json(report: Report) -> dict[str, Any]:
    """Returns the report as values that JSON can hold; null is what is not a finite number."""
    return {
        "verdict": report.verdict,
        "versions": report.versions,
        "models": [{**vars(model), "cfg": model.cfg.to_dict()} for model in report.models],
        "why": list(report.why),
        "left_out": list(report.left_out),
        "rows": [_finite({**vars(row), "ok": row.ok}) for row in report.rows],
        "half_precision": [
            _finite({**vars(row), "ratio": row.ratio, "ok": row.ok}) for row in report.ratios
        ],
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def plot(rows: Sequence[Row]) -> Figure | None:
    """Plots the error of every module's output against its depth; lines are the tolerances.

    Returns:
      The figure; None if no module was compared.
    """
    found = [row for row in rows if row.rung == "activations"]
    dtypes = [dtype for dtype in DTYPES if any(row.dtype == dtype for row in found)]
    if not found:
        return None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for dtype, color in zip(DTYPES, ("tab:blue", "tab:orange"), strict=True):
        if dtype not in dtypes:
            continue
        # Zero has no place on a logarithmic axis.
        errors = [max(row.relative, 1e-18) for row in found if row.dtype == dtype]
        axes.plot(errors, ".-", color=color, label=dtype, linewidth=0.8, markersize=4)
        axes.axhline(TOLERANCE[dtype], color=color, linestyle="--", linewidth=1)
        axes.annotate(f"tolerance {dtype}", (0, TOLERANCE[dtype]), color=color, va="bottom")
    names = [row.name for row in found if row.dtype == dtypes[0]]
    step = max(1, len(names) // 24)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel("max|flax - torch| / max|torch|")
    axes.set_title("Output of every module, in order of depth")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center right")
    return figure


def as_svg(figure: Figure) -> str:
    """Returns a figure as an SVG element, the same text for the same figure."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "parity", "svg.fonttype": "none"}):
        figure.savefig(
            stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _markdown_table(header: tuple[str, ...], lines: Lines) -> str:
    rule = "|".join(" --- " for _ in header)
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"| {' | '.join(header)} |\n|{rule}|\n{body}\n"
