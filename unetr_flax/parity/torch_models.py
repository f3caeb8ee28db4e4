"""The PyTorch model of a configuration, and its weights."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.convert import drop_unused
from unetr_flax.weights.counters import COUNTERS
from unetr_flax.weights.families import family_of
from unetr_flax.weights.torch_files import to_tensor
from unetr_flax.weights.unused_keys import known_unused
from unetr_flax.weights.unwrap import unwrap


class TorchModelError(ValueError):
    """A PyTorch model that is not installed, or that does not take the weights."""


def torch_model_of(cfg: UNETRConfig) -> torch.nn.Module:
    """Makes a fresh PyTorch model of a configuration, image [B, C, *img_size] -> [B, K, *img_size].

    Args:
      cfg: the configuration; MONAI's family needs the package monai, 1.3 or later.

    Raises:
      TorchModelError: if the package that has the model is not installed.
    """
    try:
        return family_of(cfg).torch_model.make(cfg)
    except ModuleNotFoundError as error:
        raise _not_installed(cfg, error.name) from None


def check_installed(cfg: UNETRConfig) -> None:
    """Raises TorchModelError if the package of a configuration's PyTorch model is not installed."""
    torch_model = family_of(cfg).torch_model
    if importlib.util.find_spec(torch_model.package) is None:
        raise _not_installed(cfg, torch_model.package)


def _not_installed(cfg: UNETRConfig, name: str | None) -> TorchModelError:
    return TorchModelError(
        f"{name}: not installed, and the original of family {cfg.family!r} is in it: "
        f"pip install {family_of(cfg).torch_model.install}"
    )


def load_weights(
    model: torch.nn.Module, state_dict: Mapping[str, Any], cfg: UNETRConfig
) -> torch.nn.Module:
    """Gives a model the weights of a state dict, in the model's dtype, and returns it.

    Args:
      model: that of `torch_model_of`.
      state_dict: tensors or arrays, as for `from_torch`: of any version, with wrappers' prefixes.
      cfg: the configuration.

    Raises:
      TorchModelError: if the model has a weight that it applies and that the state dict has not, or
        the other way round, or a weight of another shape.
    """
    given, _ = drop_unused(unwrap(state_dict)[0], cfg)
    tensors = {key: to_tensor(value) for key, value in given.items()}
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise TorchModelError(f"state dict: {' '.join(str(error).split())}") from None
    idle = known_unused(cfg)
    missing = [key for key in missing if key not in idle and key.rpartition(".")[2] not in COUNTERS]
    if missing or unexpected:
        raise TorchModelError(
            f"state dict: {type(model).__name__} misses {missing} and does not know {unexpected}"
        )
    return model
