"""Prepares the cases of a data set once, in parallel processes, into the cache.

The processes import no JAX, which takes a second and memory of its own.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from train.data.cache import Cache, PreparedCase
from train.data.cases import read_case
from train.data.dataset import BadCasesError, Case, DataError, Dataset
from train.data.digests import file_digests
from train.data.headers import Need
from train.data.preprocess import make_sample
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.imaging.regular_file import open_regular_file
from unetr_flax.imaging.volume import VolumeError
from unetr_flax.runtime.memory import available_memory, show_bytes

# Data sets that are smaller, in files and prepared, are prepared before a process would have
# started. Of larger ones this process would keep memory that it needs for training.
BYTES_FOR_PROCESSES = 128 << 20
_THREADS = 4

T = TypeVar("T")
Progress = Callable[[str, int, int], None]


def prepare_cases(
    dataset: Dataset,
    need: Need,
    preprocessing: Preprocessing,
    folder: Path,
    *,
    workers: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[PreparedCase]:
    """Finds the cases of a data set in the cache, and prepares those that are not there.

    Every case is checked before it enters the cache. Preparing goes on after a bad case, so that
    all of them are named at once, and what was prepared is found the next time.

    Args:
      dataset: the data set.
      need: what its headers say about its size.
      preprocessing: preparation of the images for the model.
      folder: the folder of the cache.
      workers: processes; as many as there are processors and memory allows if None.
      progress: called with what is being done, how many cases are done, and how many there are.

    Returns:
      The prepared cases, in the order of the data set.

    Raises:
      BadCasesError: naming all files that cannot be trained on, one line each.
      DataError: if the disk is too small, or a process was killed.
      OSError: if the cache cannot be written.
    """
    recipe = dataclasses.replace(dataset, cases=(), validation=())
    cache = Cache(folder, recipe, preprocessing)
    folder.mkdir(parents=True, exist_ok=True)
    cache.remove_abandoned()
    find = functools.partial(_find, cache)
    prepare = functools.partial(_prepare, cache, recipe, preprocessing)
    with _executor(need, workers) as executor:
        found = _map(executor, find, dataset.cases, functools.partial(progress, "checking cases"))
        missing = [i for i, case in enumerate(found) if not isinstance(case, PreparedCase)]
        _check_disk(folder, need, len(missing) / len(dataset.cases))
        prepared = _map(
            executor,
            prepare,
            [dataset.cases[i] for i in missing],
            functools.partial(progress, "preparing cases"),
        )
    results: list[PreparedCase | str | None] = list(found)
    for i, result in zip(missing, prepared, strict=True):
        results[i] = result
    if problems := [result for result in results if isinstance(result, str)]:
        raise BadCasesError("\n".join(problems))
    return [result for result in results if isinstance(result, PreparedCase)]


def _find(cache: Cache, case: Case) -> PreparedCase | None:
    """Looks a case up; None if it is not in the cache or cannot be read."""
    try:
        return cache.find(case.name, _key(cache, case))
    except VolumeError:
        return None


def _prepare(
    cache: Cache, dataset: Dataset, preprocessing: Preprocessing, case: Case
) -> PreparedCase | str:
    """Reads, checks and prepares a case; returns what is wrong with it if anything is."""
    try:
        volume, targets = read_case(dataset, case)
        sample = make_sample(case.name, volume, targets, preprocessing)
        return cache.add(sample, _key(cache, case))
    except BadCasesError as error:
        return str(error)
    except ValueError as error:
        return f"{case.images[0]}: {error}"
    except MemoryError:
        return f"{case.images[0]}: preparing it needs more memory than there is"


def _key(cache: Cache, case: Case) -> str:
    """Computes the key of a case; VolumeError if a file is none that could be read."""
    for path in case.files:
        if not path.is_dir():
            open_regular_file(path).close()
    try:
        return cache.key(file_digests(case.files, cache.folder / "digests"))
    except FileNotFoundError as error:
        raise VolumeError(f"{error.filename}: no such file") from None


def _map(
    executor: Executor,
    function: Callable[[Case], T],
    cases: Sequence[Case],
    progress: Callable[[int, int], None],
) -> list[T]:
    """Applies a function to cases in parallel; results are in the order of the cases."""
    futures = [executor.submit(function, case) for case in cases]
    try:
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            progress(done, len(futures))
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise DataError(
            "a process that prepared cases was killed, most likely as memory was full; "
            "--workers 1 needs less"
        ) from None
    finally:
        for future in futures:
            future.cancel()


@contextlib.contextmanager
def _executor(need: Need, workers: int | None) -> Iterator[Executor]:
    """Yields threads for a small data set, and processes for a large one."""
    if max(need.file_bytes, need.prepared_bytes) < BYTES_FOR_PROCESSES:
        with ThreadPoolExecutor(_THREADS) as threads:
            yield threads
        return
    count = workers or _default_workers(need)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=_start_worker) as processes:
        yield processes


def _default_workers(need: Need) -> int:
    """Counts the processors, and how many of the largest case memory holds beside each other."""
    known = hasattr(os, "sched_getaffinity")
    processors = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, min(processors, available_memory() // max(1, need.preparing_bytes)))


def _start_worker() -> None:
    """Leaves interrupts to the main process, and ends when that ends, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _check_disk(folder: Path, need: Need, share: float) -> None:
    """Raises DataError if the cases that are missing do not fit on the disk."""
    wanted, free = need.prepared_bytes * share, shutil.disk_usage(folder).free
    if wanted > free:
        raise DataError(
            f"{folder}: {show_bytes(free)} are free, the prepared cases need up to "
            f"{show_bytes(wanted)}; --cache names another folder, --spacing makes them smaller"
        )
