"""The task of a run: its data, and the model and preprocessing that fit them."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as ProgressBar

from train.config import Config
from train.data.dataset import Case, Dataset
from train.data.label_names import with_regions
from train.data.layouts import read_dataset
from train.data.loader import auto_roi
from train.data.phantoms import make_phantoms
from train.data.preprocess import Sample, read_samples
from train.data.split import split_dataset
from train.distributed import run_on_main
from train.options import DataOptions
from train.run_dir import PHANTOMS_NAME, OptionError
from unetr_flax import Preprocessing, UNETRConfig


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that training needs to know of the data.

    Attributes:
      dataset: the data set.
      train_samples: the preprocessed training cases.
      val_cases: the validation cases; they are read when they are segmented.
      preprocessing: preparation of a scan for the model.
      model_config: the model, with as many channels and classes as the data have.
    """

    dataset: Dataset
    train_samples: tuple[Sample, ...]
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
    dataset = _read_dataset(folder, cfg.data)
    channels = {"in_channels": len(dataset.modalities), "out_channels": dataset.num_outputs}
    train_cases, val_cases = split_dataset(
        dataset,
        val_fraction=cfg.data.val_fraction,
        seed=cfg.training.seed,
        num_folds=cfg.data.num_folds,
        fold=cfg.data.fold,
        splits=cfg.data.splits,
    )
    try:
        cfg.check_length(len(train_cases))
        # Numbers of channels and classes that the model cannot have must surface before reading.
        model_config = cfg.model_config(**channels)
        preprocessing = Preprocessing.from_modalities(
            dataset.modalities, labels=dataset.labels, spacing=cfg.data.spacing
        )
    except ValueError as error:
        raise OptionError(str(error)) from None
    with _bar(console, "reading cases", len(dataset.cases)) as advance:
        samples = read_samples(dataset, train_cases, preprocessing, advance)
    if cfg.data.roi_size is None:
        roi_size = auto_roi([sample.label.shape for sample in samples], cfg.model.patch_size)
        model_config = dataclasses.replace(model_config, img_size=roi_size)
    return Task(dataset, tuple(samples), val_cases, preprocessing, model_config)


def _read_dataset(folder: Path, options: DataOptions) -> Dataset:
    """Reads a data set, and applies the options that change what its labels mean.

    Raises:
      OptionError: if --regions does not fit the data.
      train.data.dataset.DataError: if the data set cannot be read.
    """
    dataset = read_dataset(folder, options.modalities)
    dataset = dataclasses.replace(dataset, allow_grid_mismatch=options.allow_grid_mismatch)
    try:
        return dataset if options.regions is None else with_regions(dataset, options.regions)
    except ValueError as error:
        raise OptionError(str(error)) from None


def _make_phantoms(folder: Path, cfg: Config, console: Console) -> None:
    if not folder.exists():
        with console.status(f"making {cfg.data.num_phantoms} phantoms"):
            make_phantoms(folder, cfg.data.num_phantoms, cfg.training.seed)


@contextmanager
def _bar(console: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar; yields the function that sets how many are done."""
    bar = ProgressBar(console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)
