"""Shapes and dtypes of a model's input and variables, without computing anything."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.unetr import UNETR


def abstract_image(
    cfg: UNETRConfig, batch: int = 1, dtype: DTypeLike = jnp.float32
) -> jax.ShapeDtypeStruct:
    """Returns the shape [batch, *img_size, in_channels] and dtype of a model's input.

    Args:
      cfg: the model's configuration.
      batch: number of volumes.
      dtype: dtype of the image.
    """
    return jax.ShapeDtypeStruct((batch, *cfg.img_size, cfg.in_channels), dtype)


def abstract_variables(model: UNETR, batch: int = 1) -> dict[str, Any]:
    """Returns the tree of a model's variables with a `jax.ShapeDtypeStruct` for every array.

    Args:
      model: the model.
      batch: number of volumes in the image that the model is initialized with; no variable's shape
        depends on it.

    Returns:
      {"params": ..., "batch_stats": ...}; "batch_stats" only if the model has running statistics.
    """
    return jax.eval_shape(model.init, jax.random.key(0), abstract_image(model.config, batch))
