"""python -m benchmarks: this project against PyTorch and against plain Flax, side by side."""

import dataclasses
import json
import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import report
from benchmarks.cases import FAMILIES, SIDES, Case
from benchmarks.race import RaceError, race


@dataclasses.dataclass(frozen=True)
class Options:
    """What is raced, and how often."""

    families: tuple[str, ...] = ("reference",)
    """Models: reference (light_r 4), monai."""

    edges: tuple[int, ...] = (96,)
    """Voxels per axis, multiples of 16."""

    batches: tuple[int, ...] = (1,)
    """Volumes per batch."""

    sides: tuple[str, ...] = ("ours", "torch", "torch-channels-last")
    """Who takes part: ours, ours-remat, naive, torch, torch-channels-last, torch-compile."""

    dtype: str = "float32"
    """float32, or bfloat16 (autocast in PyTorch)."""

    rounds: int = 7
    """Timed calls of each side, at least 2."""

    keep_freed_memory: bool = True
    """Whether glibc's malloc keeps freed memory, for all sides alike; off is glibc's default."""

    profile: bool = False
    """Whether to trace one step of each side too."""

    out: Path = Path("runs/benchmark")
    """Folder for report.md, report.json, scaling.png, logs and traces."""


def main(args: list[str]) -> int:
    """Returns the exit status: 0, 1 if a side failed, 2 if options cannot be."""
    options = tyro.cli(Options, args=args, prog="python -m benchmarks", description=__doc__)
    console = Console()
    try:
        _check(options)
        results = []
        for family in options.families:
            for edge in options.edges:
                for batch in options.batches:
                    case = Case(family, edge, batch, options.dtype)
                    name = f"{family}-{edge}-{batch}-{options.dtype}"
                    results += race(
                        case,
                        list(options.sides),
                        options.rounds,
                        options.out / name,
                        keep_freed_memory=options.keep_freed_memory,
                        profile=options.profile,
                        say=lambda line: console.print(line, highlight=False, soft_wrap=True),
                    )
                    # After every case, so that an interrupted run leaves what it has.
                    _write(options, results)
    except RaceError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    console.print(Markdown((options.out / "report.md").read_text()))
    console.print(f"{options.out}: report.md, report.json, scaling.png", highlight=False)
    return 0


def _write(options: Options, results: list) -> None:
    where = report.machine()
    kept = "kept" if options.keep_freed_memory else "returned"
    settings = (
        f"{options.rounds} turns each, medians; freed memory {kept} by malloc on all sides; AdamW, "
        "Dice and cross-entropy"
    )
    (options.out / "report.md").write_text(report.markdown(results, where, settings))
    as_json = report.as_json(results, where, settings)
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
    if options.rounds < 2 or not options.edges or not options.batches:
        raise ValueError("--rounds must be at least 2, --edges and --batches must not be empty")
    for edge in options.edges:
        if edge < 16 or edge % 16:
            raise ValueError(f"--edges {edge}: must be a multiple of 16")
    for batch in options.batches:
        if batch < 1:
            raise ValueError(f"--batches {batch}: must be at least 1")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
