"""Checkpoints of every released MONAI, there and back: `python -m parity_tests.monai_versions`.

Each version from 0.7 on is installed into its own folder, without its dependencies, and beside the
PyTorch and NumPy of this environment. In a process of its own it writes checkpoints of the
configurations in `CASES`. This process reads each as a user's file, computes its logits with Flax
in float64, and converts it back; the version then loads that with every key.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from unetr_flax import UNETR, UNETRConfig
from unetr_flax.parity.twins import precise
from unetr_flax.weights import (
    from_torch,
    infer_config,
    read_state_dict,
    to_torch,
    write_state_dict,
)
from unetr_flax.weights.torch_files import import_torch
from unetr_flax.weights.unused_keys import unused_keys

OLDEST = (0, 7)
TOLERANCE = 1e-10

BASE = {
    "in_channels": 2,
    "out_channels": 3,
    "img_size": [32, 16, 48],
    "feature_size": 2,
    "hidden_size": 12,
    "mlp_dim": 20,
    "num_heads": 3,
    "norm_name": "instance",
}
# What each checkpoint has instead.
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "perceptron_batch_norm": {"proj_type": "perceptron", "norm_name": "batch"},
    "basic_blocks": {"proj_type": "conv", "res_block": False, "conv_block": False},
    "flat": {"img_size": [32, 48], "spatial_dims": 2, "proj_type": "conv"},
    "qkv_bias": {"qkv_bias": True},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare checkpoints of every released MONAI with Flax, there and back.

    Exit status: 0 if all of them hold, 1 if not, 2 if a version could not be installed.
    """

    versions: tuple[str, ...] = ()
    """versions such as 1.5.2; all released ones from 0.7 on if none is given"""
    out: Path = Path("runs/monai_versions")
    """folder for the versions, their checkpoints and report.md"""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one checkpoint.

    Attributes:
      version: MONAI's version.
      case: name of the configuration.
      keys: number of keys in the checkpoint.
      unused: number of those that the model never applies.
      error: relative difference of the logits; None if they could not be compared.
      problem: why the checkpoint does not hold, in one line; None if it does.
      lacking: option of the case that the version does not have; None if it has all.
    """

    version: str
    case: str
    keys: int = 0
    unused: int = 0
    error: float | None = None
    problem: str | None = None
    lacking: str | None = None


def main() -> int:
    """Runs the command and returns its exit status."""
    options = tyro.cli(Options, prog="python -m parity_tests.monai_versions")
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    try:
        versions = options.versions or released_versions()
        if not versions:
            print("python -m parity_tests.monai_versions: pip lists no version", file=sys.stderr)
            return 2
        for version in versions:
            found = check_version(version, options.out)
            results += found
            held = sum(r.problem is None and r.lacking is None for r in found)
            lacking = sum(r.lacking is not None for r in found)
            print(f"MONAI {version}: {held} of {len(found) - lacking} hold", flush=True)
            for result in found:
                if result.problem is not None:
                    print(f"  {result.case}: {result.problem}", flush=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().rpartition("\n")[2]
        print(f"python -m parity_tests.monai_versions: {last or error}", file=sys.stderr)
        return 2
    report = options.out / "report.md"
    report.write_text(markdown(results))
    print(f"{report}: written")
    return int(any(result.problem is not None for result in results))


def released_versions() -> list[str]:
    """Asks the package index for all releases from 0.7 on, oldest first."""
    printed = _run([sys.executable, "-m", "pip", "index", "versions", "monai"])
    listed = re.search(r"Available versions: (.*)", printed)
    versions = listed[1].split(", ") if listed else []
    return [v for v in reversed(versions) if _parsed(v) >= OLDEST]


def check_version(version: str, out: Path, run: Callable[..., str] | None = None) -> list[Result]:
    """Installs a version if need be, and compares all of its checkpoints.

    Args:
      version: such as "1.5.2".
      out: folder in which the version gets a folder of its own.
      run: runs a command with a folder on the path of Python, and returns what it printed.

    Raises:
      subprocess.CalledProcessError: if it cannot be installed.
    """
    run = run or _run
    package, folder = out / version / "package", out / version / "checkpoints"
    if not (package / "monai").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        run([*pip, "--target", str(package), f"monai=={version}"])
    folder.mkdir(parents=True, exist_ok=True)
    cases = folder / "cases.json"
    cases.write_text(json.dumps({name: {**BASE, **case} for name, case in CASES.items()}))
    writer = [sys.executable, str(Path(__file__).with_name("monai_writer.py"))]
    not_written = json.loads(run([*writer, "write", str(folder), str(cases)], package))
    results = []
    for name in CASES:
        problem = not_written.get(name)
        if problem is None:
            results.append(_compare(version, name, folder / name))
        elif problem.startswith("no "):
            results.append(Result(version, name, lacking=problem.removeprefix("no ")))
        else:
            results.append(Result(version, name, problem=problem))
    there = {r.case: {**BASE, **CASES[r.case]} for r in results if r.error is not None}
    cases.write_text(json.dumps(there))
    not_read = json.loads(run([*writer, "read", str(folder), str(cases)], package))
    return [
        result
        if result.problem or result.case not in not_read
        else dataclasses.replace(result, problem=f"way back: {not_read[result.case]}")
        for result in results
    ]


def markdown(results: list[Result]) -> str:
    """Writes the results as a table, one row per version."""
    lines = [
        "| MONAI | " + " | ".join(name.replace("_", " ") for name in CASES) + " |",
        "| --- " * (len(CASES) + 1) + "|",
    ]
    for version in dict.fromkeys(result.version for result in results):
        cells = [_cell(result) for result in results if result.version == version]
        lines.append(f"| {version} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(result: Result) -> str:
    if result.lacking is not None:
        return f"has no {result.lacking}"
    if result.problem is not None:
        return result.problem
    return f"{result.error:.1e}, {result.unused} of {result.keys} keys unused"


def _compare(version: str, case: str, path: Path) -> Result:
    """Reads a checkpoint, compares the logits, and writes it back beside itself."""
    values = {**BASE, **CASES[case]}
    torch = import_torch()
    outputs = torch.load(path.with_suffix(".outputs.pt"), weights_only=True)
    try:
        file = read_state_dict(path.with_suffix(".pt"))
        cfg = infer_config(
            file.state_dict, num_heads=values["num_heads"], img_size=values["img_size"]
        )
        variables = from_torch(file.state_dict, cfg)
        image = np.moveaxis(outputs["image"].numpy(), 1, -1)
        with precise():
            ours = np.asarray(_forward(cfg)(variables, image))
        back = {**to_torch(variables, cfg), **unused_keys(cfg, version)}
        write_state_dict(path.with_suffix(".back.pt"), back, {})
    except ValueError as error:
        return Result(version, case, problem=str(error).splitlines()[0])
    theirs = np.moveaxis(outputs["logits"].numpy(), 1, -1)
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    # Without those of wrappers and counters, all keys that are not mapped are unused ones.
    unused = len(file.state_dict) - len(to_torch(variables, cfg))
    problem = None if error <= TOLERANCE else f"logits differ by {error:.1e}"
    return Result(version, case, len(file.state_dict), unused, error, problem)


@functools.cache
def _forward(cfg: UNETRConfig) -> Any:
    return jax.jit(UNETR(cfg, param_dtype=np.float64).apply)


def _parsed(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _run(command: list[str], path: Path | None = None) -> str:
    """Runs a command with a folder before all others that Python imports from."""
    environment = os.environ if path is None else {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    # What a version prints as it is imported stands before the last line.
    return done.stdout if path is None else done.stdout.strip().rpartition("\n")[2]


if __name__ == "__main__":
    sys.exit(main())
