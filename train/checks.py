"""Checks of options that can be judged without the data and the devices.

All of them raise ValueError, naming option, value and what is allowed.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from train.budget import seconds
from train.data.augment import AUGMENTATIONS
from train.losses import LOSSES
from train.optim import OPTIMIZERS, SCHEDULES
from train.options import (
    RECIPE_NAMES,
    AugmentationOptions,
    DataOptions,
    LossOptions,
    ModelOptions,
    RunOptions,
    TrainingOptions,
    option,
)

# A limit for all numbers, set by the seed: JAX's random keys drop the higher bits.
MAX_NUMBER = 2**32 - 1
# Millimeters; finer or coarser voxels than these are no medical scan.
MIN_SPACING, MAX_SPACING = 0.001, 1000.0
# A phantom takes half a megabyte and a tenth of a second.
MAX_PHANTOMS = 10_000
# Sizes that MONAI's UNETR always has.
MONAI_SIZES = {"patch_size": (16, 16, 16), "num_layers": 12}


def require(record: Any, name: str, allowed: Callable[[Any], bool], rule: str) -> None:
    """Raises ValueError if the value of a record's option is not allowed.

    Args:
      record: one of the records of `train.options`.
      name: the field.
      allowed: tells whether a value is allowed.
      rule: what is allowed, for the message.
    """
    value = getattr(record, name)
    if not allowed(value):
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise ValueError(f"{option(name)} {shown}: {rule}")


def check_finite(record: Any) -> None:
    """Checks that all numbers of a record are finite and not absurdly large."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if all(isinstance(x, int | float) for x in numbers):
            # The comparison is also false for nan.
            fits = all(abs(x) <= MAX_NUMBER for x in numbers)
            rule = f"must be finite and at most {MAX_NUMBER}"
            require(record, field.name, lambda _, fits=fits: fits, rule)


def check_data(data: DataOptions) -> None:
    """Checks the data and how they are cut."""
    _above_zero(data, "num_phantoms", "batch_size")
    rule = f"must be at most {MAX_PHANTOMS}"
    require(data, "num_phantoms", lambda x: x <= MAX_PHANTOMS, rule)
    require(data, "val_fraction", lambda x: 0 <= x < 1, "must be in [0, 1)")
    require(data, "num_folds", lambda x: x is None or x >= 2, "must be at least 2")
    require(data, "fold", lambda x: x >= 0, "must not be negative")
    if data.num_folds is not None:
        rule = f"must be below --num-folds {data.num_folds}"
        require(data, "fold", lambda x: x < data.num_folds, rule)
    elif data.splits is None:
        require(data, "fold", lambda x: x == 0, "needs --num-folds or --splits")
    rule = "excludes --num-folds; the file decides"
    require(data, "splits", lambda x: x is None or data.num_folds is None, rule)
    rule = "the first must be below the second"
    require(data, "window", lambda x: x is None or x[0] < x[1], rule)
    require(data, "roi_size", lambda x: x is None or min(x) > 0, "each must be above 0")
    require(
        data,
        "spacing",
        lambda x: x is None or (min(x) >= MIN_SPACING and max(x) <= MAX_SPACING),
        f"each must be from {MIN_SPACING:g} to {MAX_SPACING:g} mm",
    )


def check_model(model: ModelOptions) -> None:
    """Checks what `UNETRConfig` does not: it checks all other sizes."""
    rule = "must be at least 4, for four features of the decoder"
    require(model, "num_layers", lambda x: x >= 4, rule)
    if model.family == "monai":
        for name, size in MONAI_SIZES.items():
            shown = " ".join(map(str, size)) if isinstance(size, tuple) else size
            rule = f"must be {shown} for --family monai"
            require(model, name, lambda x, size=size: x == size, rule)
        rule = "32 divided by it must be a whole number for --family monai"
        require(model, "light_r", lambda x: x > 0 and (32 / x).is_integer(), rule)


def check_loss(loss: LossOptions) -> None:
    """Checks the loss."""
    _one_of(loss, "loss", LOSSES)
    _not_negative(loss, "smooth_nr", "smooth_dr")
    require(
        loss,
        "class_weights",
        lambda x: x is None or (len(x) > 0 and min(x) >= 0),
        "must not be negative",
    )


def check_augmentation(augmentation: AugmentationOptions) -> None:
    """Checks the random changes of crops."""
    _one_of(augmentation, "augmentation", AUGMENTATIONS)
    for name in ("flip_probability", "rotate90_probability"):
        require(augmentation, name, lambda x: 0 <= x <= 1, "must be in [0, 1]")
    require(
        augmentation,
        "flips",
        lambda x: len(set(x)) == len(x) and set(x) <= {0, 1, 2},
        "must be axes 0, 1 and 2, each at most once",
    )


def check_training(training: TrainingOptions) -> None:
    """Checks the optimizer, the schedule and the validation."""
    _one_of(training, "optimizer", OPTIMIZERS)
    _one_of(training, "schedule", SCHEDULES)
    if training.recipe is not None:
        _one_of(training, "recipe", RECIPE_NAMES)
    _above_zero(training, "epochs", "eval_every", "learning_rate", "clip_norm", "accumulate")
    _not_negative(training, "weight_decay", "seed")
    for name in ("warmup_fraction", "b2", "ema_decay", "stochastic_depth", "overlap"):
        require(training, name, lambda x: 0 <= x < 1, "must be in [0, 1)")
    require(training, "layer_decay", lambda x: 0 < x <= 1, "must be in (0, 1]")
    if training.budget is not None:
        try:
            seconds(training.budget)
        except ValueError as error:
            raise ValueError(f"--budget {training.budget}: {error}") from None


def check_run(run: RunOptions) -> None:
    """Checks folder, checkpoints, devices and processes."""
    _above_zero(run, "num_processes", "keep_checkpoints", "save_minutes", "fsdp", "depth_shards")
    require(run, "workers", lambda x: x is None or x > 0, "must be above 0")
    processes = f"--num-processes {run.num_processes}"
    require(run, "process_id", lambda x: 0 <= x < run.num_processes, f"must be in [0, {processes})")
    require(
        run,
        "coordinator_address",
        lambda x: (x is None) == (run.num_processes == 1),
        f"must be given if there are several processes, and only then; there is {processes}",
    )


def _above_zero(record: Any, *names: str) -> None:
    for name in names:
        require(record, name, lambda x: x > 0, "must be above 0")


def _not_negative(record: Any, *names: str) -> None:
    for name in names:
        require(record, name, lambda x: x >= 0, "must not be negative")


def _one_of(record: Any, name: str, allowed: Iterable[str]) -> None:
    *others, last = allowed
    rule = f"must be {', '.join(others)} or {last}"
    require(record, name, lambda x: x in (*others, last), rule)
