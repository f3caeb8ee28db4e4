"""Command line: `python -m parity_tests` climbs the ladder for one model and writes a report."""

import dataclasses
import json
import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from parity_tests import report
from parity_tests.causes import explain_rows, print_table
from parity_tests.ladder import RUNGS
from unetr_flax import UNETRConfig
from unetr_flax.parity.rows import Row
from unetr_flax.parity.twins import make_twins, precise
from unetr_flax.weights import read_state_dict
from unetr_flax.weights.torch_files import to_tensor

FLOAT32_RUNGS = ("activations", "masked activations")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare the Flax UNETR with its PyTorch reference, number by number.

    Exit status: 0 if every comparison is within its tolerance, 1 if not, 2 for unusable options.
    """

    img_size: tuple[int, ...] = (32, 64, 48)
    """voxels per axis"""
    in_channels: int = 1
    """channels of the image"""
    out_channels: int = 4
    """channels of the logits"""
    patch_size: tuple[int, ...] = (16,)
    """voxels per patch, one number or one per axis"""
    hidden_size: int = 768
    """width of the tokens"""
    num_layers: int = 12
    """transformer blocks"""
    num_heads: int = 8
    """attention heads"""
    mlp_dim: int | None = None
    """width of the feed-forward layer; 4 x hidden size if not given"""
    light_r: float = 4.0
    """divisor of the decoder's widths"""
    batch: int = 2
    """volumes in the batch"""
    seed: int = 0
    """seed of weights, images and masks"""
    rungs: tuple[str, ...] = tuple(RUNGS)
    """which rungs to climb; in float32 only those of forward passes are climbed"""
    checkpoint: Path | None = None
    """a checkpoint of the reference (torch.save or safetensors) instead of random weights"""
    out: Path = Path("runs/parity")
    """folder for report.md, report.json and error_by_depth.png"""
    causes: bool = False
    """instead, plant errors in small models and print which causes are named; takes minutes"""
    healthy: bool = False
    """with --causes, also diagnose 43 small models that agree, which must accuse nothing"""


def main() -> int:
    """Runs the command and returns its exit status."""
    options = tyro.cli(Options, prog="python -m parity_tests")
    console = Console()
    if options.causes:
        return print_table(options.healthy)
    try:
        cfg = _config(options)
        state_dict = None
        if options.checkpoint is not None:
            arrays = read_state_dict(options.checkpoint).state_dict
            state_dict = {key: to_tensor(value) for key, value in arrays.items()}
        rows, why = climb(options, cfg, state_dict, console)
    except ValueError as error:
        print(f"python -m parity_tests: {error}", file=sys.stderr)
        return 2
    title = f"{'random weights' if state_dict is None else options.checkpoint.name}, " + ", ".join(
        f"{name}={value}" for name, value in cfg.to_dict().items()
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.md").write_text(report.markdown(rows, title, why))
    (options.out / "report.json").write_text(json.dumps(report.as_json(rows, cfg, why), indent=1))
    report.plot(rows, options.out / "error_by_depth.png")
    console.print(report.summary_table(rows))
    failed = [row for row in rows if not row.ok]
    for row in failed[:20]:
        console.print(f"[red]differs[/red] {row.rung}: {row.name} {row.dtype} {row.relative:.2e}")
    for line in why:
        console.print(line, markup=False, highlight=False)
    console.print(
        f"{len(rows) - len(failed)} of {len(rows)} comparisons within tolerance; "
        f"tables and plot in {options.out}"
    )
    return 1 if failed else 0


def climb(
    options: Options, cfg: UNETRConfig, state_dict, console: Console
) -> tuple[list[Row], list[str]]:
    """Climbs the chosen rungs, float64 first, and shows progress.

    Returns:
      The rows of all rungs, and lines that say why comparisons do not hold.
    """
    rows, by_dtype = [], {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with precise(), Progress(*columns, console=console) as progress:
        for dtype in ("float64", "float32"):
            twins = make_twins(
                cfg, dtype, batch=options.batch, seed=options.seed, state_dict=state_dict
            )
            by_dtype[dtype] = twins
            for rung in options.rungs:
                if dtype == "float32" and rung not in FLOAT32_RUNGS:
                    continue
                task = progress.add_task(f"{dtype} {rung}", total=1)
                found = RUNGS[rung](twins)
                rows += found
                worst = max(found, key=lambda row: row.relative / row.tolerance)
                text = f"{dtype} {rung}: {len(found)} comparisons, worst {worst.relative:.1e}"
                progress.update(task, completed=1, description=text)
    return rows, explain_rows(rows, by_dtype)


def _config(options: Options) -> UNETRConfig:
    unknown = [rung for rung in options.rungs if rung not in RUNGS]
    if unknown or not options.rungs:
        raise ValueError(f"--rungs {' '.join(unknown)}: must be among {', '.join(RUNGS)}")
    patch_size = options.patch_size
    return UNETRConfig.reference(
        options.img_size,
        options.in_channels,
        options.out_channels,
        options.light_r,
        patch_size=patch_size[0] if len(patch_size) == 1 else patch_size,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        mlp_dim=options.mlp_dim,
    )


if __name__ == "__main__":
    sys.exit(main())
