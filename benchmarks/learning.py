"""Trains MONAI's UNETR in PyTorch and ours, in the same time: `python -m benchmarks.learning`.

The sides train one after the other in processes of their own, on the same split, with the same
crops and random changes of them, and are validated by the same code on the scans' own grids. Our
time is that of the whole command, with its start, compilation and validations; the rivals' clock
stands still while they are validated.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import report
from benchmarks.cases import environment
from benchmarks.learning_curve import CURVE, Point, markdown, plot, read_curve
from train.budget import seconds

POLL_SECONDS = 0.2
# The file that a finished side has: what its result depends on.
DONE = "done.json"
MONAI = "--family monai --patch-size 16 16 16 --num-layers 12"
# Names of sides: the module that trains, and its options besides the common ones.
SIDES = {
    "ours": ("train", ""),
    # MONAI's defaults (width 768, feature size 16), with learning rate and decay of its tutorial.
    "monai": (
        "benchmarks.learning_torch",
        f"{MONAI} --hidden-size 768 --num-heads 12 --light-r 2 --learning-rate 1e-4 "
        "--weight-decay 1e-5",
    ),
    # MONAI's model with the small widths, learning rate and decay of this project's defaults.
    "monai-small": (
        "benchmarks.learning_torch",
        f"{MONAI} --hidden-size 96 --num-heads 4 --light-r 4 --learning-rate 3e-3 "
        "--weight-decay 1e-2",
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained, and how long."""

    data: Path
    """Folder of a data set, as for `python -m train --data`."""

    recipe: str = "hippocampus"
    """Recipe whose options all sides share but for the model and its learning rate."""

    budget: str = "15m"
    """Time of each side, such as 5m or 1h."""

    sides: tuple[str, ...] = tuple(SIDES)
    """Sides to train: ours, monai, monai-small."""

    out: Path = Path("runs/benchmark-learning")
    """Folder for report.md, learning.png, and a folder of each side; a finished side is kept, for
    the same data, options, machine and versions."""


class SideFailed(Exception):
    """A side failed, or is another's; the message says where the reason is."""


def main(args: list[str]) -> int:
    """Runs the command; returns 0, 1 if a side failed, 2 for bad options, 130 after Ctrl-C."""
    options = tyro.cli(Options, args=args, prog="python -m benchmarks.learning")
    try:
        limit = seconds(options.budget)
    except ValueError as error:
        print(f"benchmarks: --budget {options.budget}: {error}", file=sys.stderr)
        return 2
    if not options.sides or not set(options.sides) <= set(SIDES):
        print(f"benchmarks: --sides: must be among {', '.join(SIDES)}", file=sys.stderr)
        return 2
    curves: dict[str, list[Point]] = {}
    where = report.machine()
    load = os.getloadavg()[0]
    try:
        for side in options.sides:
            folder = options.out / f"{side}-{options.budget}"
            if not _is_done(folder, facts := _facts(options, side, where)):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                print(f"{side} trains for {limit / 60:g} minutes; see {folder}.log", flush=True)
                _train(options, side, folder)
                (folder / DONE).write_text(json.dumps(facts, indent=1))
            curves[side] = read_curve(folder / CURVE)
    except SideFailed as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        message = "stopped; the same command keeps the sides that are done"
        print(f"benchmarks: {message}", file=sys.stderr)
        return 130
    heading = (
        f"{options.data.name}, recipe {options.recipe}, {options.budget} for each side; "
        f"{', '.join(where['devices'])}; {where['processor']}, {where['cores']} cores, "
        f"load {load:.1f} at the start; {torch.get_num_threads()} threads of PyTorch; "
        + ", ".join(f"{name} {where[name]}" for name in ("python", *report.PACKAGES)),
    )
    text = markdown(curves, heading)
    (options.out / "report.md").write_text(text)
    plot(curves, options.out / "learning.png")
    print(text + f"{options.out}: report.md, learning.png")
    return 0


def _facts(options: Options, side: str, where: dict[str, Any]) -> dict[str, Any]:
    """Returns all that the result of a side depends on."""
    data = str(options.data.resolve())
    return {"data": data, "recipe": options.recipe, "options": " ".join(SIDES[side]), **where}


def _is_done(folder: Path, facts: dict[str, Any]) -> bool:
    """Says whether a side is done.

    Raises:
      SideFailed: if it was done with other facts.
    """
    file = folder / DONE
    if not file.exists():
        return False
    done = json.loads(file.read_text())
    for name, value in facts.items():
        if done.get(name) != value:
            raise SideFailed(
                f"{folder} was trained with {name} {done.get(name)}, not {value}; "
                "take another --out or delete it"
            )
    return True


def _train(options: Options, side: str, folder: Path) -> None:
    """Runs the process of a side, and writes its curve.

    Raises:
      SideFailed: if the process fails or never validates.
    """
    module, own = SIDES[side]
    run = folder / "run"
    common = ["--recipe", options.recipe, "--data", str(options.data), "--budget", options.budget]
    command = [sys.executable, "-m", module, *common, "--out", str(run), *own.split()]
    log = folder.with_suffix(".log")
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment("ours" if module == "train" else "torch"),
        )
        try:
            if module == "train":
                with (folder / CURVE).open("w") as curve:
                    for point in _follow(process, run / "metrics.jsonl", started):
                        curve.write(json.dumps(dataclasses.asdict(point)) + "\n")
            status = process.wait()
        finally:
            process.kill()
    if module != "train" and (run / CURVE).exists():
        shutil.copy(run / CURVE, folder / CURVE)
    if status or not read_curve(folder / CURVE):
        last = (log.read_text().splitlines() or [""])[-1]
        raise SideFailed(f"{side}: failed, {log} says why: {last}")


def _follow(process: subprocess.Popen, path: Path, started: float) -> Iterator[Point]:
    """Yields the validations of a run of `python -m train` when they are written.

    Where weights and their average are both validated, the better one counts, as for the run.
    """
    read, running = 0, True
    point: Point | None = None
    while running:
        running = process.poll() is None
        time.sleep(POLL_SECONDS)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        now = time.perf_counter() - started
        for line in lines[read:]:
            if not line.endswith("\n"):
                break
            read += 1
            record = json.loads(line)
            # Without any class in the cases there is no Dice.
            if not record["kind"].startswith("validation") or record["mean_dice"] is None:
                continue
            if point is not None and point.step != record["step"]:
                yield point
                point = None
            dice = record["mean_dice"]
            point = Point(now, record["step"], dice if point is None else max(point.dice, dice))
    if point is not None:
        yield point


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
