"""The report of the race of whole predictions, and how far the label maps of two sides agree."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from benchmarks.predict_race import Run, median
from benchmarks.predict_worker import COMPILER, LOAD, NETWORK, STAGES, SUMS
from benchmarks.report import PACKAGES
from unetr_flax.imaging.nifti import read_labels

# Voxels from the surface of a structure that count as next to it: about one of the model's grid.
NEAR = 2


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two label maps of two classes agree.

    Attributes:
      dice: Dice of class 1.
      differing: share of all voxels that differ.
      near: share of these that are next to the surface of class 1 in the first map.
      voxels: voxels of class 1 in each map.
    """

    dice: float
    differing: float
    near: float
    voxels: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"Dice of both label maps {self.dice:.4f} ({self.voxels[0]:,} and {self.voxels[1]:,} "
            f"voxels); {self.differing:.3%} of all voxels differ, {self.near:.1%} of these within "
            f"{NEAR} voxels of the surface"
        )


def compare(ours: Path, theirs: Path) -> Agreement:
    """Compares two files of label maps.

    Raises:
      VolumeError: if a file cannot be read.
      ValueError: if one of them has no voxel of class 1.
    """
    a, b = (read_labels(path)[0] == 1 for path in (ours, theirs))
    sizes = int(a.sum()), int(b.sum())
    if not all(sizes):
        raise ValueError(f"{ours}, {theirs}: {sizes} voxels of class 1, must be some in both")
    differ = a != b
    block = np.ones((3, 3, 3), bool)
    near = ndimage.binary_dilation(a, block, NEAR) & ~ndimage.binary_erosion(a, block, NEAR)
    count = int(differ.sum())
    return Agreement(
        dice=2 * int((a & b).sum()) / sum(sizes),
        differing=count / differ.size,
        near=int((differ & near).sum()) / max(count, 1),
        voxels=sizes,
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """All that was measured.

    Attributes:
      where: description of the machine, from `report.machine`.
      settings: description of the job and of the measurement.
      sides: runs of each side, ours first.
      agreement: our label map against that of the second side.
      help: runs of `unetr predict --help`.
      cold: run of the small scan without compiled programs.
      warm: runs of the small scan with them.
      second: run of two small scans.
      sliding: run of `sliding_window_inference`.
    """

    where: dict[str, Any]
    settings: str
    sides: Mapping[str, Sequence[Run]]
    agreement: Agreement
    help: Sequence[Run]
    cold: Run
    warm: Sequence[Run]
    second: Run
    sliding: Run

    def markdown(self) -> str:
        """Writes the tables, and the machine and versions that they hold for."""
        return "\n".join(
            [
                f"{self.where['processor']}, {self.where['cores']} cores; "
                + ", ".join(f"{name} {self.where[name]}" for name in ("python", *PACKAGES)),
                "",
                self.settings,
                "",
                *self._sides(),
                "",
                *self._stages(),
                "",
                f"{self.agreement}.",
                "",
                *self._latencies(),
                "",
            ]
        )

    def as_json(self) -> dict[str, Any]:
        """Returns all measurements as values that JSON can hold."""
        return dataclasses.asdict(self)

    def _sides(self) -> list[str]:
        ours = median(next(iter(self.sides.values())), lambda run: run.wall)
        lines = [
            "| side | wall | slowest, fastest | processor | peak memory | against ours |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, runs in self.sides.items():
            walls = [run.wall for run in runs]
            wall = median(runs, lambda run: run.wall)
            lines.append(
                f"| {name} | {wall:.1f} s | {max(walls):.1f}, {min(walls):.1f} s "
                f"| {median(runs, lambda run: run.cpu):.0f} s "
                f"| {max(run.peak for run in runs) / 2**30:.2f} GiB | {wall / ours:.2f} x |"
            )
        return lines

    def _stages(self) -> list[str]:
        lines = [f"| stage | {' | '.join(self.sides)} |", "| --- |" + " --- |" * len(self.sides)]
        for stage in STAGES:
            cells = []
            for runs in self.sides.values():
                seconds = median(runs, lambda run, stage=stage: run.stage(stage))
                wall = median(runs, lambda run: run.wall)
                cells.append(f"{seconds:.1f} s, {seconds / wall:.0%}" if seconds else "")
            if any(cells):
                lines.append(f"| {stage} | {' | '.join(cells)} |")
        return lines

    def _latencies(self) -> list[str]:
        ours = next(iter(self.sides.values()))

        def first(run: Run) -> float:
            return run.answer["first_window"] - run.start

        one, two = self.second.answer["written"]
        later = [
            t for t in self.second.answer["programs"] if t > self.second.answer["first_window"]
        ]
        large = median(ours, lambda run: run.stage(SUMS) / run.stage(NETWORK))
        return [
            "| what | measured |",
            "| --- | --- |",
            f"| `unetr predict --help` | {median(self.help, lambda run: run.wall):.2f} s |",
            f"| small scan, first window, nothing compiled before | {first(self.cold):.1f} s "
            f"({self.cold.stage(LOAD):.1f} s to load, {self.cold.stage(COMPILER):.1f} s waiting "
            "for the compiler) |",
            f"| small scan, first window, with kept programs | {median(self.warm, first):.1f} s |",
            f"| small scan, all {self.cold.answer['windows']} windows, with kept programs "
            f"| {median(self.warm, lambda run: run.wall):.1f} s |",
            f"| a second small scan in the same process | {two - one:.1f} s, {len(later)} programs "
            "compiled |",
            f"| adding up windows, of the network's time, large scan | {large:.1%} |",
            "| the same for `sliding_window_inference` at 144^3 "
            f"| {self.sliding.stage(SUMS) / self.sliding.stage(NETWORK):.1%} |",
        ]
