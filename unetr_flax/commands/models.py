"""The model that a command is given: a model folder, or somebody's PyTorch file."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

from unetr_flax.commands.told import Told
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.imaging.presets import find_preprocessing
from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights import (
    CheckpointError,
    from_torch,
    infer_config,
    load_pretrained,
    read_metadata,
    read_state_dict,
    to_torch,
)
from unetr_flax.weights.convert import drop_unused

# Name of the model's configuration in the header of a safetensors file of PyTorch weights.
CONFIG_METADATA = "unetr_config"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and where it came from.

    Attributes:
      cfg: its configuration.
      variables: its Flax variables, numpy arrays.
      file_weights: the state dict in its PyTorch file; None for folders.
      held: container of the weights and removed parts, in words; None for folders.
      dropped: keys of the PyTorch file that the model never applies.
      cube_assumed: whether the window is a cube only because its number of tokens allows it.
      preprocessing: preprocessing that the folder tells; None for PyTorch files.
      provenance: where the weights came from.
    """

    cfg: UNETRConfig
    variables: dict[str, Any]
    file_weights: dict[str, Any] | None
    held: str | None
    dropped: list[str]
    cube_assumed: bool
    preprocessing: Preprocessing | None
    provenance: Any

    @classmethod
    def of_flax(
        cls,
        cfg: UNETRConfig,
        variables: dict[str, Any],
        preprocessing: Preprocessing | None,
        provenance: Any,
    ) -> Self:
        """Makes the record of a model that is in no PyTorch file."""
        return cls(
            cfg,
            variables,
            file_weights=None,
            held=None,
            dropped=[],
            cube_assumed=False,
            preprocessing=preprocessing,
            provenance=provenance,
        )

    @property
    def state_dict(self) -> dict[str, Any]:
        """Its PyTorch weights, as in the file; converted back for folders."""
        return (
            to_torch(self.variables, self.cfg) if self.file_weights is None else self.file_weights
        )


def load_model(path: Path, told: Told) -> Model:
    """Reads the model in a folder of `save_pretrained` or in a PyTorch file.

    Args:
      path: folder or file.
      told: facts that the shapes in a file do not tell; a folder needs none.

    Raises:
      CheckpointError: if it cannot be read, or something has to be told or must not be.
      WeightsError: if the weights do not fit the model that their names and shapes tell of.
    """
    if path.is_dir():
        if told != Told():
            raise CheckpointError(f"{path}: a folder tells all of its model, no option can")
        cfg, variables = load_pretrained(path)
        metadata = read_metadata(path)
        return Model.of_flax(cfg, variables, metadata["preprocessing"], metadata["provenance"])
    try:
        file = read_state_dict(path, told.ignore)
    except CheckpointError as error:
        raise CheckpointError(_as_options(str(error))) from None
    if CONFIG_METADATA in file.metadata and dataclasses.replace(told, ignore=()) == Told():
        cfg = _parsed(path, file.metadata[CONFIG_METADATA])
        cube_assumed = False
    else:
        cube_assumed = told.img_size is None
        try:
            cfg = infer_config(file.state_dict, **told.keywords())
        except ValueError as error:
            raise CheckpointError(f"{path}: {_as_options(str(error))}") from None
    _, dropped = drop_unused(file.state_dict, cfg)
    try:
        variables = from_torch(file.state_dict, cfg)
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None
    provenance = {"source": path.name, "held": file.description, "unused_keys": len(dropped)}
    return Model(
        cfg,
        variables,
        file_weights=file.state_dict,
        held=file.description,
        dropped=dropped,
        cube_assumed=cube_assumed,
        preprocessing=None,
        provenance=provenance,
    )


def read_preprocessing(option: str) -> Preprocessing:
    """Reads the value of the option --preprocessing: the name of a preset or a JSON file.

    Raises:
      ValueError: if it is neither.
    """
    try:
        return find_preprocessing(option)
    except ValueError as error:
        raise ValueError(f"--preprocessing {error}") from None


def _parsed(path: Path, text: str) -> UNETRConfig:
    try:
        return UNETRConfig.from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {CONFIG_METADATA} in its header: {error}") from None


def _as_options(message: str) -> str:
    """Replaces the names of arguments in a message by those of command-line options."""
    for name in ("num_heads", "img_size", "skip_layers", "ignore"):
        message = message.replace(f"{name}:", f"--{name.replace('_', '-')}:")
    return message.replace("norm_name:", "--norm:")
