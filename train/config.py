"""The configuration of a run: all of its options, checked, as a record and as JSON types."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from train.budget import seconds
from train.data.augment import AUGMENTATIONS
from train.losses import LOSSES
from train.optim import OPTIMIZERS, SCHEDULES
from train.options import (
    AugmentationOptions,
    DataOptions,
    LossOptions,
    ModelOptions,
    RunOptions,
    TrainingOptions,
)
from unetr_flax import UNETRConfig

# Steps are counted in int32 on the device.
MAX_STEPS = 2**31 - 1
# A limit for all numbers, set by the seed: JAX's random keys drop the higher bits.
MAX_NUMBER = 2**32 - 1
# Millimeters; finer or coarser voxels than these are no medical scan.
MIN_SPACING, MAX_SPACING = 0.001, 1000.0
# The values of --recipe; each is a file in train/recipes/ with a `RECIPE`.
RECIPE_NAMES = ("hippocampus", "spleen", "brats", "btcv-paper", "btcv-monai", "phantoms")
# A phantom takes half a megabyte and a tenth of a second.
MAX_PHANTOMS = 10_000


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a UNETR for 3D segmentation, on your data or on phantoms made here.

    The defaults shown are those for phantoms; add --data PATH to see those for data.
    """

    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    loss: LossOptions = dataclasses.field(default_factory=LossOptions)
    augmentation: AugmentationOptions = dataclasses.field(default_factory=AugmentationOptions)
    training: TrainingOptions = dataclasses.field(default_factory=TrainingOptions)
    run: RunOptions = dataclasses.field(default_factory=RunOptions)

    @property
    def out(self) -> Path:
        """The run's folder."""
        if self.run.out is not None:
            return self.run.out
        return Path("runs", "phantoms" if self.data.data is None else self.data.data.resolve().name)

    def check(self) -> None:
        """Checks everything that can be judged without the data and the devices.

        Raises:
          ValueError: naming option, value and what is allowed.
        """
        self._check_numbers()
        self.check_length(num_cases=1)
        self._check_processes()
        self._check_budget()
        for record, name, allowed in (
            (self.loss, "loss", LOSSES),
            (self.augmentation, "augmentation", AUGMENTATIONS),
            (self.training, "optimizer", OPTIMIZERS),
            (self.training, "schedule", SCHEDULES),
        ):
            rule = f"must be {_any_of(allowed)}"
            _require(record, name, lambda x, allowed=allowed: x in allowed, rule)
        recipe = self.training.recipe
        if recipe is not None and recipe not in RECIPE_NAMES:
            raise ValueError(f"--recipe {recipe}: must be {_any_of(RECIPE_NAMES)}")
        rule = "must be at least 4, for four features of the decoder"
        _require(self.model, "num_layers", lambda x: x >= 4, rule)
        if self.data.roi_size is not None:
            self.check_roi(self.data.roi_size)
        # The model checks its sizes itself; only its channels and classes depend on the data.
        self.model_config(in_channels=1, out_channels=2)

    def steps_per_epoch(self, num_cases: int) -> int:
        """Returns the number of steps of an epoch with so many training cases."""
        return max(1, num_cases // self.data.batch_size)

    def check_length(self, num_cases: int) -> None:
        """Checks that the steps of the run can be counted.

        Args:
          num_cases: number of training cases.

        Raises:
          ValueError: naming --epochs, its value and what is allowed.
        """
        limit = MAX_STEPS // self.steps_per_epoch(num_cases)
        _require(self.training, "epochs", lambda x: x <= limit, f"must be at most {limit}")

    def check_roi(self, roi_size: Sequence[int]) -> None:
        """Checks that crops of a size can be augmented.

        Raises:
          ValueError: naming the option, its value and what is allowed.
        """
        _require(
            self.augmentation,
            "rotate90_probability",
            lambda x: x == 0 or roi_size[0] == roi_size[1],
            f"needs crops of one size along axes 0 and 1, not of {' x '.join(map(str, roi_size))}",
        )

    def check_class_weights(self, num_outputs: int) -> None:
        """Checks that each output of the model has a weight in the loss, if any has.

        Raises:
          ValueError: naming --class-weights, its value and what is allowed.
        """
        rule = f"must be {num_outputs} numbers, one for each class or region of the data"
        _require(self.loss, "class_weights", lambda x: x is None or len(x) == num_outputs, rule)

    def model_config(self, in_channels: int, out_channels: int) -> UNETRConfig:
        """Builds the configuration of the model; its window is one patch if --roi-size is None.

        Args:
          in_channels: channels of the images.
          out_channels: classes, with the background.

        Raises:
          ValueError: naming an option that the model cannot have, and what is allowed.
        """
        model = self.model
        options = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
        del options["family"], options["dtype"]
        if model.family == "monai":
            self._check_monai()
            del options["num_layers"], options["patch_size"]
            options["feature_size"] = round(32 / options.pop("light_r"))
            options["mlp_dim"] = 4 * model.hidden_size
        configure = UNETRConfig.monai if model.family == "monai" else UNETRConfig.reference
        try:
            return configure(
                img_size=self.data.roi_size or model.patch_size,
                in_channels=in_channels,
                out_channels=out_channels,
                **options,
            )
        except ValueError as error:
            raise ValueError(_in_words_of_options(str(error))) from None

    def _check_monai(self) -> None:
        """Checks the options that MONAI's UNETR does not have."""
        model = self.model
        rule = "must be 16 16 16 for --family monai"
        _require(model, "patch_size", lambda x: x == (16, 16, 16), rule)
        _require(model, "num_layers", lambda x: x == 12, "must be 12 for --family monai")
        rule = "32 divided by it must be a whole number for --family monai"
        _require(model, "light_r", lambda x: x > 0 and (32 / x).is_integer(), rule)

    def _check_numbers(self) -> None:
        data, loss, training, run = self.data, self.loss, self.training, self.run
        for record in (data, self.model, loss, self.augmentation, training, run):
            for name, numbers in _numbers(record):
                # The comparison is also false for nan.
                fits = all(abs(number) <= MAX_NUMBER for number in numbers)
                rule = f"must be finite and at most {MAX_NUMBER}"
                _require(record, name, lambda _, fits=fits: fits, rule)
        for record, names in (
            (data, ("num_phantoms", "batch_size")),
            (training, ("epochs", "eval_every", "learning_rate", "clip_norm", "accumulate")),
            (run, ("num_processes", "keep_checkpoints", "save_minutes", "fsdp", "depth_shards")),
        ):
            for name in names:
                _require(record, name, lambda x: x > 0, "must be above 0")
        rule = f"must be at most {MAX_PHANTOMS}"
        _require(data, "num_phantoms", lambda x: x <= MAX_PHANTOMS, rule)
        _require(run, "workers", lambda x: x is None or x > 0, "must be above 0")
        for record, names in (
            (training, ("weight_decay", "seed")),
            (loss, ("smooth_nr", "smooth_dr")),
        ):
            for name in names:
                _require(record, name, lambda x: x >= 0, "must not be negative")
        for name in ("warmup_fraction", "b2", "ema_decay", "stochastic_depth", "overlap"):
            _require(training, name, lambda x: 0 <= x < 1, "must be in [0, 1)")
        for name in ("flip_probability", "rotate90_probability"):
            _require(self.augmentation, name, lambda x: 0 <= x <= 1, "must be in [0, 1]")
        _require(
            self.augmentation,
            "flips",
            lambda x: len(set(x)) == len(x) and set(x) <= {0, 1, 2},
            "must be axes 0, 1 and 2, each at most once",
        )
        _require(training, "layer_decay", lambda x: 0 < x <= 1, "must be in (0, 1]")
        _require(
            loss,
            "class_weights",
            lambda x: x is None or (len(x) > 0 and min(x) >= 0),
            "must not be negative",
        )
        _require(data, "val_fraction", lambda x: 0 <= x < 1, "must be in [0, 1)")
        _require(data, "num_folds", lambda x: x is None or x >= 2, "must be at least 2")
        _require(data, "fold", lambda x: x >= 0, "must not be negative")
        if data.num_folds is not None:
            rule = f"must be below --num-folds {data.num_folds}"
            _require(data, "fold", lambda x: x < data.num_folds, rule)
        elif data.splits is None:
            _require(data, "fold", lambda x: x == 0, "needs --num-folds or --splits")
        rule = "excludes --num-folds; the file decides"
        _require(data, "splits", lambda x: x is None or data.num_folds is None, rule)
        _require(
            data,
            "window",
            lambda x: x is None or x[0] < x[1],
            "the first must be below the second",
        )
        _require(data, "roi_size", lambda x: x is None or min(x) > 0, "each must be above 0")
        _require(
            data,
            "spacing",
            lambda x: x is None or (min(x) >= MIN_SPACING and max(x) <= MAX_SPACING),
            f"each must be from {MIN_SPACING:g} to {MAX_SPACING:g} mm",
        )

    def _check_budget(self) -> None:
        budget = self.training.budget
        if budget is None:
            return
        try:
            seconds(budget)
        except ValueError as error:
            raise ValueError(f"--budget {budget}: {error}") from None

    def _check_processes(self) -> None:
        data, run = self.data, self.run
        processes = f"--num-processes {run.num_processes}"
        _require(
            self.training,
            "accumulate",
            lambda x: data.batch_size % x == 0,
            f"--batch-size {data.batch_size} must be divisible by it",
        )
        _require(
            run, "process_id", lambda x: 0 <= x < run.num_processes, f"must be in [0, {processes})"
        )
        _require(
            run,
            "coordinator_address",
            lambda x: (x is None) == (run.num_processes == 1),
            f"must be given if there are several processes, and only then; there is {processes}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns name and value of every option but those of `RunOptions`, as JSON types."""
        return {
            field.name: _to_json(getattr(record, field.name))
            for record in (self.data, self.model, self.loss, self.augmentation, self.training)
            for field in dataclasses.fields(record)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverts `to_dict`, with default `RunOptions`.

        Raises:
          ValueError: if options are missing or unknown, as those of another version are.
        """
        values = OPTIONS_BEFORE_NAMES | values
        if (names := values.keys() ^ cls().to_dict().keys()) != set():
            raise ValueError(f"options {sorted(names)}: missing or unknown")

        def build(record: type) -> Any:
            return record(
                **{f.name: _from_json(f.name, values[f.name]) for f in dataclasses.fields(record)}
            )

        return cls(
            data=build(DataOptions),
            model=build(ModelOptions),
            loss=build(LossOptions),
            augmentation=build(AugmentationOptions),
            training=build(TrainingOptions),
        )


# Options that came later, with the values that reproduce what runs did without them.
OPTIONS_BEFORE_NAMES = {
    "loss": "dice_cross_entropy",
    "exclude_background": False,
    "squared_pred": False,
    "batch_dice": False,
    "smooth_nr": 1e-5,
    "smooth_dr": 1e-5,
    "class_weights": None,
    "augmentation": "default",
    "flips": [],
    "flip_probability": 0.5,
    "rotate90_probability": 0.0,
    "budget": None,
    "schedule": "cosine",
    "optimizer": "adamw",
    "b2": 0.999,
    "layer_decay": 1.0,
    "accumulate": 1,
    "ema_decay": 0.0,
    "stochastic_depth": 0.0,
    "modalities": None,
    "regions": None,
    "window": None,
    "crop_foreground": False,
    "family": "reference",
    "recipe": None,
    "init": None,
    "init_encoder": None,
    "allow_grid_mismatch": False,
    "num_folds": None,
    "fold": 0,
    "splits": None,
}


def option(name: str) -> str:
    """Returns the name of a field as it is written on the command line."""
    return "--" + name.replace("_", "-")


def _require(record: Any, name: str, allowed: Callable[[Any], bool], rule: str) -> None:
    value = getattr(record, name)
    if not allowed(value):
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise ValueError(f"{option(name)} {shown}: {rule}")


def _numbers(record: Any) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yields name and numbers of every option that has any."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        values = value if isinstance(value, tuple) else (value,)
        if all(isinstance(x, int | float) for x in values):
            yield field.name, values


def _any_of(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _in_words_of_options(message: str) -> str:
    """Rewrites an error of `UNETRConfig`, "field=value: rule", to name the option."""
    field, separator, rest = message.partition("=")
    options = {f.name: option(f.name) for f in dataclasses.fields(ModelOptions)}
    options["img_size"] = "--roi-size"
    if not separator or field not in options:
        return message
    value, _, rule = rest.partition(": ")
    value = value.strip("()").replace(",", "")
    return f"{options[field]} {value}: {rule}"


def _to_json(value: Any) -> Any:
    if isinstance(value, Path):
        # A run may be resumed from another folder.
        return str(value.absolute())
    return list(value) if isinstance(value, tuple) else value


def _from_json(name: str, value: Any) -> Any:
    if name in ("data", "splits", "init", "init_encoder") and value is not None:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
