"""What a race found: Markdown, JSON and a plot."""

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.race import Result

PACKAGES = ("jax", "jaxlib", "flax", "torch", "monai")


def machine() -> dict[str, Any]:
    """Where the race is run, and with what."""
    import jax

    return {
        "devices": [device.device_kind for device in jax.devices()],
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def best_of_torch(results: list[Result], result: Result) -> float | None:
    """Median seconds of the fastest PyTorch side in the same race; None if there is none."""
    rivals = [
        r.median
        for r in results
        if (r.case, r.what) == (result.case, result.what) and r.side.startswith("torch")
    ]
    return min(rivals, default=None)


def markdown(results: list[Result], where: dict[str, Any], settings: str) -> str:
    """The table, and the machine and versions that it holds for."""
    lines = [
        f"{', '.join(where['devices'])}; {where['processor']}, {where['cores']} cores; "
        + ", ".join(f"{name} {where[name]}" for name in ("python", *PACKAGES)),
        "",
        settings,
        "",
        "| model and shape | what | side | first call | median | spread | against the best PyTorch "
        "| peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        rival = best_of_torch(results, result)
        ratio = "" if rival is None else f"{rival / result.median:.2f} x"
        peak = "" if result.peak is None else f"{result.peak / 2**30:.2f} GiB"
        lines.append(
            f"| {result.case} | {result.what} | {result.side} | {result.first:.1f} s "
            f"| {result.median:.3f} s | {result.spread:.0%} | {ratio} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def as_json(results: list[Result], where: dict[str, Any], settings: str) -> dict[str, Any]:
    """Everything that was measured."""
    rows = [
        {**dataclasses.asdict(result), "median": result.median, "spread": result.spread}
        for result in results
    ]
    return {"machine": where, "settings": settings, "results": rows}


def plot(results: list[Result], path: Path) -> None:
    """Seconds of a step and peak memory against the number of voxels, one line for each side."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (
        ("forward", "seconds of a forward pass", lambda r: r.median),
        ("step", "seconds of a training step", lambda r: r.median),
        ("step", "peak GiB of a training step", lambda r: r.peak / 2**30),
    )
    for axis, (what, title, value) in zip(axes, panels, strict=True):
        groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for result in results:
            if result.what == what:
                voxels = result.case.batch * result.case.edge**3
                key = (result.case.family, result.side)
                groups.setdefault(key, []).append((voxels, value(result)))
        for (family, side), points in groups.items():
            points.sort()
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{side}, {family}")
        axis.set(xscale="log", yscale="log", xlabel="voxels in the batch", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
