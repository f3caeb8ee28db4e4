"""One run from its options to its results: data, model, loop, table and picture."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress as ProgressBar

from train import sharding as devices
from train.checkpoint import Checkpoints
from train.config import Config
from train.data.decathlon import Case, Dataset, read_dataset, split
from train.data.loader import Batches, auto_roi
from train.data.phantoms import make_phantoms
from train.data.preprocess import Sample, read_samples
from train.data.transforms import Augmentation
from train.export import save_model
from train.interrupt import Interrupt
from train.log import RunLog, results_table
from train.loop import Progress, Schedule, fit
from train.losses import dice_cross_entropy_loss
from train.optim import learning_rate_schedule, make_optimizer
from train.run_dir import OptionError, refuse_taken, resume_command, write_run_file
from train.state import abstract_state, create_state
from train.step import abstract_batch, make_train_step
from train.validate import Evaluator
from train.visualize import Column, save_predictions
from unetr_flax import UNETR, Preprocessing, UNETRConfig
from unetr_flax.runtime.aot import compile_in_background
from unetr_flax.runtime.cudnn import refuse_wrong_convolutions

PICTURED_CASES = 4


def run(cfg: Config) -> bool:
    """Trains, and shows results if the end is reached rather than interrupted.

    Raises:
      OptionError: if options do not fit the data, the devices or the folder.
      unetr_flax.runtime.cudnn.CudnnError: if this machine's cuDNN computes wrongly in --dtype.
      train.data.decathlon.BadCasesError: if files of the data cannot be trained on.
      train.data.decathlon.DataError: if the data set as a whole cannot be read.
      train.loop.DivergenceError: if the loss is no longer a number.
    """
    refuse_wrong_convolutions(cfg.model.dtype)
    console = Console(quiet=not devices.is_main())
    if cfg.data.batch_size % jax.device_count():
        raise OptionError(
            f"--batch-size {cfg.data.batch_size}: must be divisible by the number of devices, "
            f"{jax.device_count()}"
        )
    if not cfg.run.resume:
        devices.run_on_main(lambda: refuse_taken(cfg.out))
    with _undone_on_failure(cfg):
        dataset, train_samples, val_cases, model_config = _prepare(cfg, console)
        devices.run_on_main(lambda: write_run_file(cfg, dataset, val_cases, model_config))
    return _train(cfg, console, dataset, train_samples, val_cases, model_config)


def _train(
    cfg: Config,
    console: Console,
    dataset: Dataset,
    train_samples: list[Sample],
    val_cases: tuple[Case, ...],
    model_config: UNETRConfig,
) -> bool:
    training = cfg.training
    schedule = Schedule(
        steps_per_epoch=max(1, len(train_samples) // cfg.data.batch_size),
        epochs=training.epochs,
        eval_every=training.eval_every,
    )
    learning_rate = learning_rate_schedule(
        training.learning_rate, schedule.total_steps, training.warmup_fraction
    )
    tx = make_optimizer(
        learning_rate, weight_decay=training.weight_decay, clip_norm=training.clip_norm
    )
    model = UNETR(model_config, dtype=jnp.dtype(cfg.model.dtype))
    mesh = devices.make_mesh()
    sharding = devices.replicated(mesh)
    abstract = abstract_state(model, tx, sharding)
    evaluator = Evaluator(model, val_cases, _preprocessing(cfg, dataset), training.overlap)
    batches = Batches(
        train_samples,
        model_config.img_size,
        cfg.data.batch_size,
        training.seed,
        augmentation=Augmentation(),
        part=(jax.process_index(), jax.process_count()),
    )
    checkpoints = Checkpoints(cfg.out / "checkpoints")
    # It takes about as long to compile as a state to make or to read.
    train_step = compile_in_background(
        make_train_step(model, tx, dice_cross_entropy_loss, sharding),
        abstract,
        abstract_batch(model_config, cfg.data.batch_size, devices.batch_sharding(mesh)),
    )
    try:
        progress = Progress()
        if checkpoints.last_step is None:
            state = create_state(model, tx, training.seed, sharding)
        else:
            state, position = checkpoints.restore_last(abstract)
            batches.restore(position["batches"])
            progress = Progress(**position["progress"])
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        console.print(
            f"{dataset.name}: {len(train_samples)} cases to train on, {len(val_cases)} to "
            "validate\n"
            f"UNETR with {parameters:,} parameters on {jax.device_count()} "
            f"{jax.default_backend()} device(s), {cfg.model.dtype}\n"
            f"{schedule.total_steps} steps in {schedule.epochs} epochs; {cfg.out} starts at step "
            f"{int(state.step)}; Ctrl-C saves and stops",
            highlight=False,
            soft_wrap=True,
        )
        log = RunLog(
            cfg.out if devices.is_main() else None,
            dataset.labels,
            schedule.epochs,
            schedule.steps_per_epoch,
            int(state.step),
        )
        with log, Interrupt() as interrupt:
            done = fit(
                state,
                progress,
                schedule=schedule,
                batches=batches,
                train_step=train_step,
                shard_batch=lambda batch: devices.shard_batch(batch, mesh),
                evaluate=lambda state: evaluator(state, interrupt),
                learning_rate=learning_rate,
                checkpoints=checkpoints,
                log=log,
                interrupt=interrupt,
            )
        if done:
            variables = devices.local_copy(checkpoints.restore_best(abstract.variables))
            if devices.is_main():
                record = json.loads((cfg.out / "config.json").read_text(encoding="utf-8"))
                save_model(cfg.out / "model", variables, record, progress.best_step)
                _show_results(cfg, console, dataset, evaluator, variables, val_cases, progress)
        else:
            console.print(f"Saved at step {checkpoints.last_step}. To go on:")
            console.print(resume_command(cfg), soft_wrap=True, highlight=False, markup=False)
        return done
    finally:
        batches.close()
        checkpoints.close()


def _prepare(
    cfg: Config, console: Console
) -> tuple[Dataset, list[Sample], tuple[Case, ...], UNETRConfig]:
    """Data set, preprocessed training cases, validation cases, and the model that fits them."""
    folder = cfg.data.data
    if folder is None:
        folder = cfg.out / "data"
        devices.run_on_main(lambda: _make_phantoms(folder, cfg, console))
    dataset = read_dataset(folder)
    # Wrong sizes should come to light before the data are read.
    roi_size = cfg.data.roi_size or cfg.model.patch_size
    model_config = _model_config(cfg, dataset, roi_size)
    train_cases, val_cases = split(dataset.cases, cfg.data.val_fraction, cfg.training.seed)

    with _bar(console, "reading cases", len(dataset.cases)) as advance:
        samples = read_samples(dataset, train_cases, _preprocessing(cfg, dataset), advance)
    if cfg.data.roi_size is None:
        shapes = [sample.label.shape for sample in samples]
        model_config = _model_config(cfg, dataset, auto_roi(shapes, cfg.model.patch_size))
    return dataset, samples, val_cases, model_config


def _preprocessing(cfg: Config, dataset: Dataset) -> Preprocessing:
    """Builds the preprocessing of a run: the defaults of the data's modalities, and --spacing."""
    try:
        return Preprocessing.from_modalities(
            dataset.modalities, labels=dataset.labels, spacing=cfg.data.spacing
        )
    except ValueError as error:
        raise OptionError(f"preprocessing: {error}") from None


def _make_phantoms(folder: Path, cfg: Config, console: Console) -> None:
    if not folder.exists():
        with console.status(f"making {cfg.data.num_phantoms} phantoms"):
            make_phantoms(folder, cfg.data.num_phantoms, cfg.training.seed)


def _model_config(cfg: Config, dataset: Dataset, roi_size: tuple[int, ...]) -> UNETRConfig:
    try:
        return UNETRConfig.reference(
            img_size=roi_size,
            in_channels=len(dataset.modalities),
            out_channels=len(dataset.labels),
            **{k: v for k, v in dataclasses.asdict(cfg.model).items() if k != "dtype"},
        )
    except ValueError as error:
        raise OptionError(f"model: {error}; img_size is --roi-size") from None


def _show_results(
    cfg: Config,
    console: Console,
    dataset: Dataset,
    evaluator: Evaluator,
    variables: dict[str, Any],
    val_cases: tuple[Case, ...],
    progress: Progress,
) -> None:
    columns = [
        Column(sample.name, sample.image[..., 0], sample.label, prediction, sample.spacing)
        for sample, prediction in evaluator.segment(variables, val_cases[:PICTURED_CASES])
    ]
    picture = cfg.out / "predictions.png"
    save_predictions(picture, columns, dataset.labels)
    console.print(f"Best on the {len(val_cases)} validation cases, at step {progress.best_step}:")
    console.print(results_table(progress.best, dataset.labels))
    for what, path in (
        ("picture", picture),
        ("metrics", cfg.out / "metrics.jsonl"),
        ("TensorBoard", cfg.out / "tensorboard"),
        ("best model", cfg.out / "model"),
    ):
        console.print(f"{what}: {path}", highlight=False, soft_wrap=True)


@contextmanager
def _bar(console: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar for preparations; gives the function that sets how many are done."""
    bar = ProgressBar(console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def _undone_on_failure(cfg: Config) -> Iterator[None]:
    """Leaves no phantoms of a run that fails before it is one."""
    try:
        yield
    except BaseException:
        made_here = cfg.data.data is None and not (cfg.out / "config.json").exists()
        if made_here and devices.is_main():
            shutil.rmtree(cfg.out / "data", ignore_errors=True)
        raise
