"""The options of a run: frozen records, whose fields are the command line and `config.json`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import tyro


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to learn from."""

    data: Path | None = None
    """Folder in the layout of the Medical Segmentation Decathlon; phantoms are made if None."""

    num_phantoms: int = 20
    """Phantoms to make, if there is no --data."""

    val_fraction: float = 0.2
    """Share of the cases that is kept for validation."""

    spacing: tuple[float, float, float] | None = None
    """Millimetres per voxel and axis to resample to; each volume keeps its own if None."""

    roi_size: tuple[int, int, int] | None = None
    """Voxels per axis that the model sees, multiples of --patch-size; from the data if None."""

    batch_size: int = 2
    """Volumes per step, over all devices and processes."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The UNETR; see `unetr_flax.UNETRConfig.reference`."""

    patch_size: tuple[int, int, int] = (8, 8, 8)
    """Voxels per token and axis, each 1, 2, 4, 8 or 16."""

    light_r: float = 4.0
    """Divisor of the decoder's 32 to 512 channels; may be fractional."""

    hidden_size: int = 96
    """Width of the tokens; 768 in the paper."""

    num_layers: int = 4
    """Transformer blocks; 12 in the paper."""

    num_heads: int = 4
    """Attention heads; divides --hidden-size."""

    dropout_rate: float = 0.0
    """Probability of dropping embeddings, attention weights and feed-forward units."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation. Parameters, statistics, softmax and loss stay float32."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How to learn."""

    epochs: int = 24
    """Passes over the training cases."""

    learning_rate: float = 4e-3
    """Highest rate of AdamW, reached by linear warm-up and left on a cosine to 0."""

    warmup_fraction: float = 0.05
    """Share of all steps that is warm-up."""

    weight_decay: float = 1e-2
    """Of AdamW; kernels only."""

    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""

    eval_every: int = 8
    """Epochs between validations, each of which saves a checkpoint; there is one at the end."""

    overlap: float = 0.25
    """Share of the window that neighbors have in common in validation."""

    seed: int = 0
    """Of split, parameters, order and augmentation of the data, dropout and phantoms."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where the run lives. Only these may differ when it is resumed."""

    out: Path | None = None
    """Folder for checkpoints, logs and results; runs/ and the name of the data if None."""

    resume: bool = False
    """Go on from the last checkpoint in --out. All other options are those of the run."""

    coordinator_address: str | None = None
    """host:port of process 0, to train with several processes, each with its own devices."""

    num_processes: int = 1
    """Processes of the run."""

    process_id: int = 0
    """Which of them this is, from 0."""

    keep_freed_memory: bool = False
    """On CPU with glibc: keep freed memory for later steps, which are faster for it."""

    compilation_cache: str | None = None
    """Private folder of compiled programs, '' for none; one in ~/.cache if None."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a UNETR for 3D segmentation, on your data or on phantoms made here.

    The defaults shown are those for phantoms; add --data PATH to see those for data.
    """

    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    training: TrainingOptions = TrainingOptions()
    run: RunOptions = RunOptions()

    @property
    def out(self) -> Path:
        """The run's folder."""
        if self.run.out is not None:
            return self.run.out
        return Path("runs", "phantoms" if self.data.data is None else self.data.data.resolve().name)

    def check(self) -> None:
        """Checks what can be judged without the data; the model checks its own options.

        Raises:
          ValueError: naming option, value and what is allowed.
        """
        data, training, run = self.data, self.training, self.run
        for record, names in (
            (data, ("num_phantoms", "batch_size")),
            (training, ("epochs", "eval_every", "learning_rate", "clip_norm")),
            (run, ("num_processes",)),
        ):
            for name in names:
                _require(record, name, lambda x: x > 0, "must be above 0")
        for name in ("weight_decay", "seed"):
            _require(training, name, lambda x: x >= 0, "must not be negative")
        for name in ("warmup_fraction", "overlap"):
            _require(training, name, lambda x: 0 <= x < 1, "must be in [0, 1)")
        _require(data, "val_fraction", lambda x: 0 < x < 1, "must be in (0, 1)")
        for name in ("spacing", "roi_size"):
            _require(data, name, lambda x: x is None or min(x) > 0, "each must be above 0")
        processes = f"--num-processes {run.num_processes}"
        _require(
            data,
            "batch_size",
            lambda x: x % run.num_processes == 0,
            f"must be divisible by {processes}",
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
        """Name and value of every option but those of `RunOptions`, as JSON has them."""
        return {
            field.name: _to_json(getattr(record, field.name))
            for record in (self.data, self.model, self.training)
            for field in dataclasses.fields(record)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`, with default `RunOptions`.

        Raises:
          ValueError: if options are missing or unknown, as those of another version are.
        """
        if (names := values.keys() ^ cls().to_dict().keys()) != set():
            raise ValueError(f"options {sorted(names)}: missing or unknown")

        def build(record: type) -> Any:
            return record(
                **{f.name: _from_json(f.name, values[f.name]) for f in dataclasses.fields(record)}
            )

        return cls(build(DataOptions), build(ModelOptions), build(TrainingOptions))


PHANTOMS = Config()
DATA = Config(training=TrainingOptions(epochs=12, eval_every=4, learning_rate=2e-3))


def parse(args: list[str], defaults: Config | None = None) -> Config:
    """Options from the command line.

    Args:
      args: the command line without the program's name.
      defaults: of options that are not given; if None, those for phantoms or for data.

    Raises:
      SystemExit: with status 2, after saying what is wrong, if an option is not understood; with
        status 0 after --help.
    """
    if defaults is None:
        has_data = any(arg == "--data" or arg.startswith("--data=") for arg in args)
        defaults = DATA if has_data else PHANTOMS
    return tyro.cli(
        Config,
        prog="python -m train",
        args=args,
        default=defaults,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def option(name: str) -> str:
    """A field as it is written on the command line."""
    return "--" + name.replace("_", "-")


def _require(record: Any, name: str, allowed: Callable[[Any], bool], rule: str) -> None:
    value = getattr(record, name)
    if not allowed(value):
        raise ValueError(f"{option(name)} {value}: {rule}")


def _to_json(value: Any) -> Any:
    if isinstance(value, Path):
        # A run may be resumed from another folder.
        return str(value.absolute())
    return list(value) if isinstance(value, tuple) else value


def _from_json(name: str, value: Any) -> Any:
    if name == "data" and value is not None:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
