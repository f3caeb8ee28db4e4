"""The task of a run: its data, and the model and preprocessing that fit them."""

import dataclasses
import getpass
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as ProgressBar

from train.config import Config
from train.data.cache import PreparedCase, PreparedCases
from train.data.dataset import Case, DataError, Dataset
from train.data.headers import Need, measure
from train.data.label_names import with_regions
from train.data.layouts import read_dataset
from train.data.loader import auto_roi
from train.data.phantoms import make_phantoms
from train.data.prepare import prepare_cases
from train.data.preprocess import make_preprocessing
from train.data.split import Split, split_dataset
from train.data.targets import MOST_REGIONS
from train.distributed import is_main, run_on_main
from train.memory import check_roi
from train.run_dir import PHANTOMS_NAME, OptionError
from unetr_flax import Preprocessing, UNETRConfig
from unetr_flax.runtime.compilation_cache import default_folder
from unetr_flax.runtime.memory import show_bytes


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that training needs to know of the data.

    Attributes:
      dataset: the data set.
      train_samples: the prepared training cases.
      val_cases: the validation cases; they are read when they are segmented.
      preprocessing: preparation of a scan for the model.
      model_config: the model, with as many channels and outputs as the data have.
    """

    dataset: Dataset
    train_samples: PreparedCases
    val_cases: tuple[Case, ...]
    preprocessing: Preprocessing
    model_config: UNETRConfig


def prepare(cfg: Config, console: Console) -> Task:
    """Reads, checks and preprocesses the data of a run; phantoms are generated first.

    Raises:
      OptionError: if options do not fit the data.
      train.data.dataset.BadCasesError: if files of the data cannot be trained on.
      train.data.dataset.DataError: if the data set as a whole cannot be read.
    """
    folder = cfg.data.data
    if folder is None:
        folder = cfg.out / PHANTOMS_NAME
        run_on_main(lambda: _make_phantoms(folder, cfg, console))
    dataset = read_run_dataset(folder, cfg)
    channels = {"in_channels": len(dataset.modalities), "out_channels": dataset.num_outputs}
    train_cases, val_cases = split_cases(dataset, cfg)
    try:
        cfg.check_length(len(train_cases))
        cfg.check_class_weights(dataset.num_outputs)
        # Numbers of channels and classes that the model cannot have must surface before reading.
        model_config = cfg.model_config(**channels)
        preprocessing = make_preprocessing(
            dataset.modalities,
            dataset.labels,
            spacing=cfg.data.spacing,
            window=cfg.data.window,
            crop_foreground=cfg.data.crop_foreground,
        )
    except ValueError as error:
        raise OptionError(str(error)) from None
    # A fold leaves all cases in use; a file of splits may leave some out.
    dataset = dataclasses.replace(
        dataset, cases=tuple(sorted(train_cases + val_cases, key=lambda case: case.name))
    )
    results = _prepare_cases(dataset, preprocessing, cfg, console)
    prepared = dict(zip(dataset.cases, results, strict=True))
    samples = PreparedCases([prepared[case] for case in train_cases])
    _check_labels(dataset, samples.cases, results, console)
    if cfg.data.roi_size is None:
        roi_size = auto_roi([case.shape for case in samples.cases], cfg.model.patch_size)
        model_config = dataclasses.replace(model_config, img_size=roi_size)
        try:
            cfg.check_roi(roi_size)
        except ValueError as error:
            raise OptionError(str(error)) from None
    return Task(dataset, samples, val_cases, preprocessing, model_config)


def read_run_dataset(folder: Path, cfg: Config) -> Dataset:
    """Reads a data set, and applies the options that change what its labels mean.

    Raises:
      OptionError: if --regions does not fit the data, or the loss does not fit regions.
      train.data.dataset.DataError: if the data set cannot be read.
    """
    options = cfg.data
    dataset = read_dataset(folder, options.modalities)
    dataset = dataclasses.replace(dataset, allow_grid_mismatch=options.allow_grid_mismatch)
    if options.regions is not None:
        try:
            dataset = with_regions(dataset, options.regions)
        except ValueError as error:
            raise OptionError(str(error)) from None
    regions = len(dataset.labels) - 1
    if dataset.has_regions and regions > MOST_REGIONS:
        raise DataError(
            f"data set {dataset.name}: {regions} regions, must be at most {MOST_REGIONS}"
        )
    if cfg.loss.exclude_background and dataset.has_regions:
        raise OptionError(
            f"--exclude-background: is for classes; the data set {dataset.name} has regions, which "
            "have no channel of the background"
        )
    return dataset


def split_cases(dataset: Dataset, cfg: Config) -> Split:
    """Splits the cases of a run's data set into training and validation cases.

    Raises:
      train.data.dataset.DataError: if the data set cannot be split so.
    """
    return split_dataset(
        dataset,
        val_fraction=cfg.data.val_fraction,
        seed=cfg.training.seed,
        num_folds=cfg.data.num_folds,
        fold=cfg.data.fold,
        splits=cfg.data.splits,
    )


def _prepare_cases(
    dataset: Dataset, preprocessing: Preprocessing, cfg: Config, console: Console
) -> list[PreparedCase]:
    """Prepares all cases on the main process first; the others then find them in the cache.

    Where the cache is on a disk that the processes do not share, each prepares them for itself.
    """
    folder = cfg.run.cache or default_cache()
    results: list[PreparedCase] = []

    def work() -> None:
        need = measure(dataset, preprocessing)
        check_roi(cfg, need)
        console.print(_size(dataset, need, folder), soft_wrap=True)
        with _bar(console) as progress:
            results.extend(
                prepare_cases(
                    dataset,
                    need,
                    preprocessing,
                    folder,
                    workers=cfg.run.workers,
                    progress=progress,
                )
            )

    run_on_main(work)
    if not is_main():
        work()
    return results


def default_cache() -> Path:
    """Returns a folder for prepared cases, in ~/.cache or else in the temporary folder.

    Raises:
      OptionError: if the home folder cannot be written and another user has the temporary one.
    """
    folder = default_folder().parent / "cases"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a read-only home folder must not stop the run
    user = getpass.getuser() if os.name != "posix" else os.getuid()
    folder = Path(tempfile.gettempdir(), f"unetr_flax-cases-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.name == "posix" and folder.stat().st_uid != os.getuid():
        raise OptionError(f"{folder}: belongs to another user; --cache names another folder")
    return folder


def _size(dataset: Dataset, need: Need, folder: Path) -> str:
    return (
        f"{len(dataset.cases)} cases, {show_bytes(need.file_bytes)} in files; prepared they take "
        f"{show_bytes(need.prepared_bytes)} in {folder}, from where they are read as needed"
    )


def _check_labels(
    dataset: Dataset,
    train_cases: Sequence[PreparedCase],
    cases: Sequence[PreparedCase],
    console: Console,
) -> None:
    """Warns of labels and ids that look wrong.

    Raises:
      DataError: if no training case has any foreground.
    """
    ignored = [case for case in cases if case.ignored]
    if not any(sum(case.counts[1:]) for case in train_cases):
        hint = f" ({dataset.ignored_id} marks voxels that do not count)" if ignored else ""
        raise DataError(
            f"{dataset.name}: no voxel of the {len(train_cases)} training cases is labeled as "
            f"{', '.join(dataset.labels[1:])}; all are {dataset.labels[0]}{hint}, so there is "
            "nothing to learn"
        )
    totals = [sum(case.counts[i] for case in cases) for i in range(len(dataset.labels))]
    for name, total in zip(dataset.labels, totals, strict=True):
        if not total:
            console.print(f"Warning: no case has a voxel of {name}", soft_wrap=True)
    if ignored:
        console.print(
            f"Voxels with the id {dataset.ignored_id} do not count; {len(ignored)} of {len(cases)} "
            "cases have some",
            soft_wrap=True,
        )


def _make_phantoms(folder: Path, cfg: Config, console: Console) -> None:
    if not folder.exists():
        with console.status(f"making {cfg.data.num_phantoms} phantoms"):
            make_phantoms(folder, cfg.data.num_phantoms, cfg.training.seed)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a progress bar; yields the function that sets what is done and how much of it."""
    bar = ProgressBar(console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )
