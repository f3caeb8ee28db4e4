"""Times whole predictions beside MONAI's transforms and inferer: `python -m benchmarks.predict`.

A CT-like phantom of 512 x 512 x 168 voxels is segmented from its file to the file of a label map,
by `unetr predict` and by MONAI's transforms, inferer and UNETR with the same weights. The sides
take turns, each time in a new process. The start of the command and of a small scan are measured
as well.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import report
from benchmarks.predict_case import LARGE, PREPROCESSING, SMALL, CaseFolder, make_case
from benchmarks.predict_race import PredictionError, Run, run
from benchmarks.predict_report import Report, compare

OURS = "unetr predict"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and how often."""

    rounds: int = 3
    """Runs of each side."""

    batches: tuple[int, ...] = (1, 4)
    """Windows at a time of MONAI's inferer, one side each; ours chooses by itself."""

    out: Path = Path("runs/benchmark-predict")
    """Folder for report.md, report.json, logs, scans and label maps; 1 GB."""


def main(args: list[str]) -> int:
    """Runs the command; returns 0, or 1 if a process failed, or 2 for bad options."""
    options = tyro.cli(Options, args=args, prog="python -m benchmarks.predict", description=__doc__)
    console = Console()
    if options.rounds < 1 or not options.batches or min(options.batches) < 1:
        print("benchmarks: --rounds and --batches: must be at least 1", file=sys.stderr)
        return 2
    try:
        found = _Race(options, console).run()
    except PredictionError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    (options.out / "report.md").write_text(found.markdown())
    (options.out / "report.json").write_text(json.dumps(found.as_json(), indent=1) + "\n")
    console.print(Markdown(found.markdown()))
    console.print(f"{options.out}: report.md, report.json", highlight=False)
    return 0


class _Race:
    """The processes that are run, one after the other."""

    def __init__(self, options: Options, console: Console):
        self._options, self._console = options, console
        self._folder = CaseFolder(options.out / "case")
        self._cache = options.out / "cache"
        self._count = 0

    def run(self) -> Report:
        options, folder = self._options, self._folder
        self._say(f"makes scans and a model in {folder.path}")
        # In a process of its own, whose memory is free afterwards.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(make_case, folder).result()
        shutil.rmtree(self._cache, ignore_errors=True)
        load = os.getloadavg()[0]

        helps = [self._python("unetr_flax", "predict", "--help") for _ in range(options.rounds)]
        cold = self._ours(folder.scan(SMALL))
        warm = [self._ours(folder.scan(SMALL)) for _ in range(options.rounds)]
        pair = options.out / "pair"
        pair.mkdir(exist_ok=True)
        for name in ("a", "b"):
            shutil.copy(folder.scan(SMALL), pair / f"{name}.nii.gz")
        second = self._ours(pair)
        sliding = self._worker("sliding", folder.model, folder.scan(SMALL))

        monai = {f"MONAI, batches of {batch}": batch for batch in options.batches}
        sides: dict[str, list[Run]] = {name: [] for name in (OURS, *monai)}
        for _ in range(options.rounds):
            sides[OURS].append(self._ours(folder.scan(LARGE)))
            for name, batch in monai.items():
                run = self._worker(
                    "monai", folder.state_dict, folder.scan(LARGE), "--batch", str(batch)
                )
                sides[name].append(run)
        file = folder.scan(LARGE).name
        agreement = compare(self._labels("ours") / file, self._labels("monai") / file)
        settings = (
            f"A phantom of {LARGE} ({sides[OURS][0].answer['windows']} windows), a small one of "
            f"{SMALL}; MONAI's UNETR of 96^3, width 768, feature size 16, 2 classes, float32; "
            f"spacing {PREPROCESSING.spacing}, overlap 0.5, gaussian weights. Whole processes, "
            f"medians of {options.rounds} in turns; load of the machine {load:.1f} at the start, "
            f"{os.getloadavg()[0]:.1f} at the end."
        )
        return Report(
            report.machine(), settings, sides, agreement, helps, cold, warm, second, sliding
        )

    def _ours(self, scan: Path) -> Run:
        return self._worker("ours", self._folder.model, scan)

    def _worker(self, side: str, model: Path, scan: Path, *more: str) -> Run:
        labels = self._labels(side)
        labels.mkdir(exist_ok=True)
        return self._python("benchmarks.predict_worker", side, model, scan, labels, *more)

    def _python(self, *arguments: str | Path) -> Run:
        self._count += 1
        self._say(f"{self._count}: {' '.join(map(str, arguments))}")
        found = run(arguments, self._cache, self._options.out / f"{self._count}.log")
        self._say(f"{found.wall:.1f} s, {found.peak / 2**30:.2f} GiB")
        return found

    def _labels(self, side: str) -> Path:
        return self._options.out / f"labels-{side}"

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
