"""Many cases, one after the other: the next is read and the last is written meanwhile."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Literal

import jax
import numpy as np

from unetr_flax.imaging.case_files import CaseFiles
from unetr_flax.imaging.scan import read_scan
from unetr_flax.inference.outputs import CaseOutputs, Extras, write_outputs
from unetr_flax.inference.segment import Prepared, Segmenter
from unetr_flax.inference.segmentation import Segmentation
from unetr_flax.viewing.statistics import LabelStatistics

# What makes a case fail, but not the others: JaxRuntimeError is what a device runs out of memory
# with.
FAILURES = (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError)


@dataclasses.dataclass(frozen=True)
class Case:
    """A scan to segment.

    Attributes:
      name: its name, which no other case has.
      files: its files.
      outputs: where its label map and other files go.
    """

    name: str
    files: CaseFiles
    outputs: CaseOutputs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
      case: the case.
      status: "done", or "failed" with an error.
      error: one line that says what is wrong.
      seconds: from the start of its preparation to its last file.
      voxels: number of voxels of each class id that occurs; mask r counts as class r + 1.
      nan_voxels: voxels that were NaN and taken for the lowest intensity.
      statistics: measurements of each label, if they were asked for.
    """

    case: Case
    status: Literal["done", "failed"]
    error: str | None = None
    seconds: float = 0.0
    voxels: dict[int, int] = dataclasses.field(default_factory=dict)
    nan_voxels: int = 0
    statistics: Sequence[LabelStatistics] = ()


def segment_cases(
    segmenter: Segmenter,
    cases: Sequence[Case],
    *,
    extras: Extras,
    postprocess: Callable[[np.ndarray], None],
    allow_nan: bool,
    progress: Callable[[Case, int, int], None],
) -> Iterator[Outcome]:
    """Segments cases and writes their files; a case that cannot be segmented stops no other.

    While windows of one case are computed, the next one is read and prepared and the one before is
    written, so up to three cases are in memory.

    Args:
      segmenter: segments scans.
      cases: the cases.
      extras: what is written beside the label maps.
      postprocess: changes a label map or masks in place.
      allow_nan: whether voxels that are NaN become the lowest intensity.
      progress: called with the case, the windows done and all windows.

    Yields:
      The outcome of each case, in order.
    """
    with ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "write") as writing:

        def read(case: Case) -> Future[_Read]:
            return reading.submit(_read, segmenter, case, allow_nan, extras.need_scan)

        def segment(case: Case, found: _Read) -> Future[Outcome]:
            with ExitStack() as stack:
                segmentation = _segment(segmenter, case, found.prepared, extras, stack, progress)
                postprocess(segmentation.labels)
                # What the stack holds is still needed to write.
                kept = stack.pop_all()
            return writing.submit(_write, segmenter, case, segmentation, extras, kept, found)

        ahead = [read(case) for case in cases[:1]]
        behind: list[tuple[Case, Callable[[], Outcome]]] = []
        try:
            for i, case in enumerate(cases):
                present = ahead.pop()
                # The next case is read once the memory for reading this one is free.
                present.exception()
                ahead = [read(following) for following in cases[i + 1 : i + 2]]
                try:
                    behind.append((case, segment(case, present.result()).result))
                except FAILURES as error:
                    behind.append((case, functools.partial(_fail, error)))
                del present
                if len(behind) > 1:
                    yield _outcome(*behind.pop(0))
            for last in behind:
                yield _outcome(*last)
        finally:
            for future in ahead:
                future.cancel()


@dataclasses.dataclass(frozen=True)
class _Read:
    """A case that has been read, with the time when that began."""

    prepared: Prepared
    nan_voxels: int
    start: float


def _read(segmenter: Segmenter, case: Case, allow_nan: bool, keep_scan: bool) -> _Read:
    start = time.perf_counter()
    scan = read_scan(case.files.images, allow_nan=allow_nan)
    prepared = segmenter.prepare(scan.volume, scan.grid)
    if not keep_scan:
        prepared = dataclasses.replace(prepared, volume=None)
    return _Read(prepared, scan.nan_voxels, start)


def _segment(
    segmenter: Segmenter,
    case: Case,
    prepared: Prepared,
    extras: Extras,
    stack: ExitStack,
    progress: Callable[[Case, int, int], None],
) -> Segmentation:
    soft: np.ndarray | bool = False
    if extras.probabilities:
        assert prepared.file_grid is not None
        soft = stack.enter_context(
            case.outputs.probabilities_on_disk(prepared.file_grid, segmenter.num_classes)
        )
    return segmenter.segment_prepared(
        prepared, probabilities=soft, progress=lambda done, count: progress(case, done, count)
    )


def _write(
    segmenter: Segmenter,
    case: Case,
    segmentation: Segmentation,
    extras: Extras,
    stack: ExitStack,
    found: _Read,
) -> Outcome:
    with stack:
        rows = write_outputs(case.outputs, extras, segmentation, segmenter.preprocessing)
    voxels = segmentation.count_voxels()
    seconds = time.perf_counter() - found.start
    return Outcome(case, "done", None, seconds, voxels, found.nan_voxels, rows)


def _fail(error: Exception) -> Outcome:
    raise error


def _outcome(case: Case, result: Callable[[], Outcome]) -> Outcome:
    try:
        return result()
    except MemoryError:
        return Outcome(case, "failed", "more than memory holds")
    except FAILURES as error:
        return Outcome(case, "failed", " ".join(str(error).split()) or type(error).__name__)
