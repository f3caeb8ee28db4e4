"""A model whose encoder is a pretrained vision transformer's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unetr_flax.commands.models import Model, load_model
from unetr_flax.commands.told import Told
from unetr_flax.model.abstract import abstract_image
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.unetr import UNETR
from unetr_flax.runtime.compiler_options import compiler_options
from unetr_flax.weights import CheckpointError, read_state_dict
from unetr_flax.weights.encoders import Transfer, load_encoder


def read_encoder(
    source: Path,
    cfg: UNETRConfig,
    variables: dict[str, Any],
    img_size: Sequence[int] | None,
    ignore: Sequence[str] = (),
) -> tuple[dict[str, Any], Transfer]:
    """Puts the encoder in a PyTorch file into a model.

    Args:
      source: the file.
      cfg: the model's configuration.
      variables: the model's variables.
      img_size: the encoder's window, see `load_encoder`.
      ignore: patterns of keys to drop.

    Raises:
      CheckpointError: naming the file, if it cannot be read or the encoder does not fit.
    """
    file = read_state_dict(source, ignore)
    try:
        return load_encoder(file.state_dict, cfg, variables, img_size=img_size)
    except CheckpointError as error:
        message = str(error).replace("img_size:", "--encoder-img-size:")
        raise CheckpointError(f"{source}: {message}") from None


def read_target(path: Path) -> Model:
    """Reads the model that an encoder is for.

    Args:
      path: a model folder, or a JSON file of a configuration: config.json of a model folder, or
        what `UNETRConfig.to_dict` gives.

    Returns:
      The model; of a JSON file with variables that are initialized with seed 0.

    Raises:
      CheckpointError: if it is neither.
    """
    if path.is_dir():
        return load_model(path, Told())
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        cfg = UNETRConfig.from_dict(values.get("config", values))
    except OSError as error:
        raise CheckpointError(f"--encoder-for {path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"--encoder-for {path}: must be a model folder or the JSON of a configuration ({error})"
        ) from None
    image = abstract_image(cfg)
    # A third of the time to compile.
    init = jax.jit(UNETR(cfg, jit_blocks=True).init, compiler_options=compiler_options())
    variables = init(jax.random.key(0), jnp.zeros(image.shape, image.dtype))
    return Model.of_flax(cfg, jax.device_get(variables), None, None)
