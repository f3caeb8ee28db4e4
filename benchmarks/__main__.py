"""Times this project beside PyTorch and its own plain definitions: `python -m benchmarks`.

With --gpu it does three things on a GPU: it checks the results of the GPU's lowering, measures the
limits of the device, and times all sides at the usual sizes in bfloat16.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import device_parity, report, roofline
from benchmarks.cases import FAMILIES, GPU_SHAPES, SIDES, Case
from benchmarks.race import RaceError, Result, race
from unetr_flax.runtime.cudnn import CudnnError


@dataclasses.dataclass(frozen=True)
class Options:
    """Sides, models and shapes to measure, and how often."""

    gpu: bool = False
    """Defaults for a GPU: all sides but naive and remat, bfloat16, all of its usual shapes."""

    families: tuple[str, ...] = ("reference",)
    """Models: reference (light_r 4), monai."""

    edges: tuple[int, ...] = (96,)
    """Voxels per axis, multiples of 16."""

    batches: tuple[int, ...] = (1,)
    """Volumes per batch."""

    sides: tuple[str, ...] = ("ours", "torch", "torch-channels-last")
    """Sides to time: ours, ours-remat, naive, torch, torch-channels-last, torch-compile."""

    dtype: str = "float32"
    """float32, or bfloat16 (autocast in PyTorch)."""

    rounds: int = 7
    """Timed calls of each side, at least 2."""

    keep_freed_memory: bool = True
    """Whether glibc's malloc keeps freed memory, for all sides; glibc's own default is no."""

    profile: bool = False
    """Whether to trace one step of each side too."""

    out: Path = Path("runs/benchmark")
    """Folder for report.md, report.json, scaling.png, logs and traces."""


GPU = Options(
    gpu=True,
    edges=(),
    batches=(),
    sides=("ours", "torch", "torch-channels-last", "torch-compile"),
    dtype="bfloat16",
    rounds=20,
    keep_freed_memory=False,
    out=Path("runs/benchmark-gpu"),
)


def main(args: list[str]) -> int:
    """Runs the command; returns 0, or 1 if a side or the device failed, or 2 for bad options."""
    defaults = GPU if "--gpu" in args else Options()
    options = tyro.cli(
        Options, args=args, default=defaults, prog="python -m benchmarks", description=__doc__
    )
    console = Console()

    def say(line: object) -> None:
        console.print(str(line), highlight=False, soft_wrap=True)

    # This process asks for the devices, but leaves their memory to the processes of the sides.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        _check(options)
        platform = jax.default_backend()
        if options.gpu and platform != "gpu":
            raise ValueError(f"--gpu: JAX finds no GPU here, but {platform}")
        parity = _parity(options, say) if platform != "cpu" else []
        say("limits of the device")
        peaks = roofline.measure_elsewhere(options.dtype)
        results = []
        for case in _cases(options):
            results += race(
                case,
                list(options.sides),
                options.rounds,
                options.out / f"{case.family}-{case.edge}-{case.batch}-{case.dtype}",
                device=platform,
                keep_freed_memory=options.keep_freed_memory,
                profile=options.profile,
                say=say,
            )
            # Written after every case, so that an interrupted run leaves the finished cases.
            _write(options, parity, peaks, results)
    except (RaceError, CudnnError, subprocess.CalledProcessError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    console.print(Markdown((options.out / "report.md").read_text()))
    console.print(f"{options.out}: report.md, report.json, scaling.png", highlight=False)
    return 0


def _parity(options: Options, say: Callable[[object], None]) -> list[str]:
    """Compares the device's lowering with the CPU's; returns the results as lines of text."""
    say("the device's lowering against the CPU's")
    rows = device_parity.compare_elsewhere(options.dtype)
    for row in rows:
        say(row)
    if failed := [row for row in rows if not row.holds]:
        raise RaceError(f"the device computes something else: {failed[0]}")
    return [str(row) for row in rows]


def _cases(options: Options) -> list[Case]:
    shapes = [(edge, batch) for edge in options.edges for batch in options.batches or (1,)]
    if options.gpu and not options.edges:
        shapes = [(e, b) for e, b in GPU_SHAPES if b in (options.batches or (b,))]
    return [
        Case(family, edge, batch, options.dtype)
        for family in options.families
        for edge, batch in shapes
    ]


def _write(
    options: Options, parity: list[str], peaks: roofline.Peaks, results: list[Result]
) -> None:
    where = report.machine()
    kept = "kept" if options.keep_freed_memory else "returned"
    settings = (
        f"{options.rounds} calls each, medians; freed memory {kept} by malloc on all sides; AdamW, "
        "Dice and cross-entropy"
    )
    if parity:
        settings += f". Errors against float64: {'; '.join(parity)}"
    text = report.markdown(results, where, settings, peaks)
    (options.out / "report.md").write_text(text)
    as_json = report.as_json(results, where, settings, peaks)
    (options.out / "report.json").write_text(json.dumps(as_json, indent=1) + "\n")
    report.plot(results, options.out / "scaling.png")


def _check(options: Options) -> None:
    for name, values, allowed in (
        ("--sides", options.sides, tuple(SIDES)),
        ("--families", options.families, FAMILIES),
        ("--dtype", (options.dtype,), ("float32", "bfloat16")),
    ):
        if unknown := set(values) - set(allowed):
            raise ValueError(f"{name} {', '.join(sorted(unknown))}: must be among {allowed}")
        if not values:
            raise ValueError(f"{name}: needs at least one of {allowed}")
    if options.rounds < 2:
        raise ValueError(f"--rounds {options.rounds}: must be at least 2")
    if not _cases(options):
        raise ValueError("--edges and --batches: name no shape")
    for edge in options.edges:
        if edge < 16 or edge % 16:
            raise ValueError(f"--edges {edge}: must be a multiple of 16")
    for batch in options.batches:
        if batch < 1:
            raise ValueError(f"--batches {batch}: must be at least 1")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
