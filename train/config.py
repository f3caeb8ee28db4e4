"""The configuration of a run: all of its options, checked, as a record and as JSON types."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from train import checks
from train.checks import require
from train.options import (
    AugmentationOptions,
    DataOptions,
    LossOptions,
    ModelOptions,
    RunOptions,
    TrainingOptions,
    option,
)
from unetr_flax import UNETRConfig

# Steps are counted in int32 on the device.
MAX_STEPS = 2**31 - 1


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

    @property
    def is_planned(self) -> bool:
        """Whether options that are not given follow from the data, by a plan."""
        new = self.run.resume != "yes"
        return new and self.data.data is not None and self.training.recipe is None

    def check(self) -> None:
        """Checks everything that can be judged without the data and the devices.

        Raises:
          ValueError: naming option, value and what is allowed.
        """
        data, training = self.data, self.training
        for record in (data, self.model, self.loss, self.augmentation, training, self.run):
            checks.check_finite(record)
        checks.check_data(data)
        checks.check_loss(self.loss)
        checks.check_augmentation(self.augmentation)
        checks.check_training(training)
        checks.check_run(self.run)
        self.check_length(num_cases=1)
        rule = f"--batch-size {data.batch_size} must be divisible by it"
        require(training, "accumulate", lambda x: data.batch_size % x == 0, rule)
        if data.roi_size is not None:
            self.check_roi(data.roi_size)
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
        require(self.training, "epochs", lambda x: x <= limit, f"must be at most {limit}")

    def check_roi(self, roi_size: Sequence[int]) -> None:
        """Checks that crops of a size can be augmented.

        Raises:
          ValueError: naming the option, its value and what is allowed.
        """
        require(
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
        require(self.loss, "class_weights", lambda x: x is None or len(x) == num_outputs, rule)

    def model_config(self, in_channels: int, out_channels: int) -> UNETRConfig:
        """Builds the configuration of the model; its window is one patch if --roi-size is None.

        Args:
          in_channels: channels of the images.
          out_channels: classes, with the background.

        Raises:
          ValueError: naming an option that the model cannot have, and what is allowed.
        """
        model = self.model
        checks.check_model(model)
        options = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
        del options["family"], options["dtype"]
        if model.family == "monai":
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
    "remat": False,
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
