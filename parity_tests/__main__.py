"""Command line: `python -m parity_tests` climbs the ladder for one model and writes a report."""

import json
import sys
from pathlib import Path

import torch
import tyro
from rich.console import Console

from parity_tests import report as reports
from parity_tests.causes import print_table
from parity_tests.climb import climb, told
from parity_tests.devices import use_platform
from parity_tests.options import Options
from parity_tests.page import page
from parity_tests.ratio_rows import RatioRow
from unetr_flax import UNETRConfig
from unetr_flax.runtime.ending import end_process, one_line
from unetr_flax.weights import from_torch, read_state_dict
from unetr_flax.weights.torch_files import to_tensor


def main() -> int:
    """Runs the command and returns its exit status."""
    options = tyro.cli(Options, prog="python -m parity_tests")
    console = Console()
    if options.causes:
        return print_table(options.healthy)
    try:
        cfg = options.config()
        use_platform(options.platform)
        state_dict = None
        if options.checkpoint is not None:
            state_dict = read_weights(options.checkpoint, cfg)
        # An unusable folder is told before the long work.
        make_folder(options.out)
        with console.status("comparing"):
            report = climb(
                options,
                cfg,
                state_dict,
                lambda step, rows: console.print(told(step, rows), highlight=False),
                # Two processes would each want most of an accelerator's memory.
                parallel=options.platform == "cpu",
            )
    except ValueError as error:
        print(f"python -m parity_tests: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m parity_tests: interrupted", file=sys.stderr)
        return 130
    for table in reports.console_tables(report):
        console.print(table)
    for row in report.failed[:20]:
        figure = f"ratio {row.ratio:.3f}" if isinstance(row, RatioRow) else f"{row.relative:.2e}"
        console.print(f"[red]differs[/red] {row.rung}: {row.name} {row.dtype} {figure}")
    for line in (*report.why, *(f"left out: {line}" for line in report.left_out)):
        console.print(line, markup=False, highlight=False)
    try:
        write(report, options.out)
    except OSError as error:
        console.print(report.verdict, highlight=False)
        print(f"python -m parity_tests: --out {options.out}: {error}", file=sys.stderr)
        return 2
    console.print(f"{report.verdict}; report in {options.out / 'report.html'}", highlight=False)
    return report.status


def make_folder(folder: Path) -> None:
    """Makes the folder of the report.

    Raises:
      ValueError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: {error.strerror}") from None


def read_weights(file: Path, cfg: UNETRConfig) -> dict[str, torch.Tensor]:
    """Reads the weights of a model.

    Args:
      file: written by torch.save, or safetensors.
      cfg: the model's configuration.

    Raises:
      ValueError: if the file cannot be read or its weights do not fit.
    """
    arrays = read_state_dict(file).state_dict
    try:
        from_torch(arrays, cfg)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return {key: to_tensor(value) for key, value in arrays.items()}


def write(report: reports.Report, folder: Path) -> None:
    """Writes report.html, report.md, report.json and the plot into a folder."""
    (folder / "report.html").write_text(page(report))
    (folder / "report.md").write_text(reports.markdown(report))
    (folder / "report.json").write_text(
        json.dumps(reports.as_json(report), indent=1, allow_nan=False)
    )
    if (figure := reports.plot(report.rows)) is not None:
        figure.savefig(folder / reports.PLOT, dpi=150)


if __name__ == "__main__":
    end_process(main())
