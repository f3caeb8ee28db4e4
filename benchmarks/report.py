"""Reports of a race: Markdown, JSON and a plot."""

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from benchmarks.race import Result
from benchmarks.roofline import Peaks

PACKAGES = ("jax", "jaxlib", "flax", "torch", "monai")


def machine() -> dict[str, Any]:
    """Describes the machine and the versions of packages."""
    import jax

    return {
        "devices": [device.device_kind for device in jax.devices()],
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def best_of_torch(results: list[Result], result: Result) -> float | None:
    """Returns the median seconds of the fastest PyTorch side in the same race, None without one."""
    rivals = [
        r.median
        for r in results
        if (r.case, r.what) == (result.case, result.what)
        and r.side.startswith("torch")
        and r.failure is None
    ]
    return min(rivals, default=None)


def markdown(
    results: list[Result], where: dict[str, Any], settings: str, peaks: Peaks | None = None
) -> str:
    """Writes the tables, and the machine and versions that they hold for.

    Args:
      results: the measurements.
      where: description of the machine, from `machine`.
      settings: description of how the measurements were made.
      peaks: limits of the device for the table of the roofline, which is left out if None.
    """
    lines = [
        f"{', '.join(where['devices'])}; {where['processor']}, {where['cores']} cores; "
        + ", ".join(f"{name} {where[name]}" for name in ("python", *PACKAGES)),
        "",
        settings,
        "",
        "| model and shape | what | side | first call | median | spread | volumes/s "
        "| against the best PyTorch | peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(results, result) for result in results),
    ]
    if peaks is not None:
        lines += ["", *_roofline(results, peaks)]
    return "\n".join(lines) + "\n"


def _row(results: list[Result], result: Result) -> str:
    start = f"| {result.case} | {result.what} | {result.side} | "
    if result.failure is not None:
        return start + f"{result.failure} |  |  |  |  |  |"
    rival = best_of_torch(results, result)
    ratio = "" if rival is None else f"{rival / result.median:.2f} x"
    peak = "" if result.peak is None else f"{result.peak / 2**30:.2f} GiB"
    return start + (
        f"{result.first:.1f} s | {seconds(result.median)} | {result.spread:.0%} "
        f"| {result.volumes_per_second:.3g} | {ratio} | {peak} |"
    )


def _roofline(results: list[Result], peaks: Peaks) -> list[str]:
    """Compares the operations and traffic of programs with the limits of the device."""
    lines = [
        f"Measured on this device: {peaks.flops / 1e12:.3g} TFLOP/s in a product of matrices, "
        f"{peaks.bandwidth / 1e9:.4g} GB/s in a copy. The roofline is the least time that either "
        "allows.",
        "",
        "| model and shape | what | side | operations | traffic | TFLOP/s | of the peak | GB/s "
        "| of the peak | of the roofline | program's memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        if result.cost is None:
            continue
        cost, median = result.cost, result.median
        flops, bandwidth = cost.flops / median, cost.traffic / median
        lines.append(
            f"| {result.case} | {result.what} | {result.side} | {cost.flops / 1e12:.3g} T "
            f"| {cost.traffic / 2**30:.3g} GiB | {flops / 1e12:.3g} | {flops / peaks.flops:.0%} "
            f"| {bandwidth / 1e9:.4g} | {bandwidth / peaks.bandwidth:.0%} "
            f"| {peaks.seconds(cost) / median:.0%} | {cost.needed / 2**30:.2f} GiB |"
        )
    return lines


def seconds(value: float) -> str:
    """Formats a time, in milliseconds if it is short."""
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"


def as_json(
    results: list[Result], where: dict[str, Any], settings: str, peaks: Peaks | None = None
) -> dict[str, Any]:
    """Returns all measurements as values that JSON can hold."""
    rows = []
    for result in results:
        row = dataclasses.asdict(result)
        if result.failure is None:
            for name in ("median", "spread", "volumes_per_second"):
                row[name] = getattr(result, name)
        rows.append(row)
    found = {"machine": where, "settings": settings, "results": rows}
    return found if peaks is None else found | {"peaks": dataclasses.asdict(peaks)}


def plot(results: list[Result], path: Path) -> None:
    """Plots seconds and peak memory against the number of voxels, one line for each side."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (
        ("forward", "seconds of a forward pass", lambda r: r.median),
        ("step", "seconds of a training step", lambda r: r.median),
        ("step", "peak GiB of a training step", lambda r: r.peak / 2**30),
    )
    for axis, (what, title, value) in zip(axes, panels, strict=True):
        groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
        shapes: dict[int, str] = {}
        for result in results:
            if result.what == what and result.failure is None:
                batch, edge = result.case.batch, result.case.edge
                voxels = batch * edge**3
                shapes[voxels] = f"{edge}³" if batch == 1 else f"{batch} x {edge}³"
                key = (result.case.family, result.side)
                groups.setdefault(key, []).append((voxels, value(result)))
        for (family, side), points in groups.items():
            points.sort()
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{side}, {family}")
        axis.set(xscale="log", yscale="log", xlabel="voxels in the batch", title=title)
        axis.set_xticks(list(shapes), list(shapes.values()))
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.minorticks_off()
        axis.grid(alpha=0.3)
    if any(result.failure is None for result in results):
        axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _processor() -> str:
    """Returns the processor's name, on Linux the full one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
