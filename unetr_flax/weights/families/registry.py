"""The class of checkpoint families, and the registry of all families."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.family_spec import FAMILY_SPECS
from unetr_flax.weights.tables import Table


def all_outputs(output: Any, cfg: UNETRConfig) -> Sequence[Any]:
    """Takes the features from an encoder that returns the four of them and nothing else."""
    return output


def no_unused_keys(cfg: UNETRConfig, version: str | None) -> dict[str, np.ndarray]:
    """Returns nothing: the model applies every key that it writes."""
    return {}


@dataclasses.dataclass(frozen=True)
class TorchModel:
    """The PyTorch model of a family, for the comparison with the Flax model.

    Attributes:
      make: builds the model of a configuration, image [B, C, *img_size] -> logits
        [B, K, *img_size]. Imports its package only when called.
      package: name of that package.
      install: argument of `pip install` that installs it.
      encoder: name of the module that returns the features.
      stages: names of the modules that end the decoder's stages, coarsest first.
      qkv: order of the output features of one linear map, such as "(h d qkv)", or the names, below
        the attention module, of three maps for queries, keys and values.
      attention_dropout: name, below the attention module, of the dropout that the attention weights
        pass through.
      features: takes the four features [B, N, E] from the encoder's output.
    """

    make: Callable[[UNETRConfig], Any]
    package: str
    install: str
    encoder: str
    stages: tuple[str, ...]
    qkv: str | tuple[str, str, str]
    attention_dropout: str
    features: Callable[[Any, UNETRConfig], Sequence[Any]] = all_outputs


@dataclasses.dataclass(frozen=True)
class Family:
    """All that is known about one author's files.

    Attributes:
      name: the name of the family in `UNETRConfig.family`.
      signature: prefix of some keys of every model of this family and of no other family.
      table: returns the names of modules and arrays of a configuration.
      config: infers the configuration from shapes. Called with `Shapes` and, by keyword,
        `num_heads`, `img_size` (None if not told), `dropout_rate` and each of `options`.
      default_num_heads: attention heads that the author's code has by default.
      options: which of `infer_config`'s arguments "skip_layers" and "norm_name" apply.
      torch_model: the PyTorch model.
      unused_keys: returns the arrays that a version of the model writes and never applies, as
        float32 identities by key.
      versions: the versions of the author's code at which the unused keys changed, oldest first;
        empty if they never did.
    """

    name: str
    signature: str
    table: Callable[[UNETRConfig], Table]
    config: Callable[..., UNETRConfig]
    default_num_heads: int
    options: tuple[str, ...]
    torch_model: TorchModel
    unused_keys: Callable[[UNETRConfig, str | None], dict[str, np.ndarray]] = no_unused_keys
    versions: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family known to `infer_config`, `from_torch`, `to_torch` and all commands.

    Args:
      family: the record; the model's side of it, its `FamilySpec`, must be registered already.

    Raises:
      ValueError: if the name or the signature is taken, or there is no such `FamilySpec`.
    """
    if family.name not in FAMILY_SPECS:
        raise ValueError(f"family {family.name!r}: register its FamilySpec first")
    for other in FAMILIES.values():
        if family.name == other.name or family.signature == other.signature:
            raise ValueError(
                f"family {family.name!r}, signature {family.signature!r}: family {other.name!r} "
                f"with signature {other.signature!r} is registered already"
            )
    FAMILIES[family.name] = family


def family_of(cfg: UNETRConfig) -> Family:
    """Returns the family of a configuration.

    Raises:
      ValueError: if only its `FamilySpec` is registered, so nothing is known about its files.
    """
    if cfg.family not in FAMILIES:
        raise ValueError(f"family {cfg.family!r}: nothing is known about its PyTorch files")
    return FAMILIES[cfg.family]
