"""A small model for tests; the application itself never imports this file."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Small(nn.Module):
    """A model with the interface of a UNETR that compiles in no time.

    A norm with running statistics, dropout and a linear map of each voxel.

    Attributes:
      config: has img_size, in_channels and out_channels.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    config: Any
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    jit_blocks: bool = False
    remat: bool = False
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps [B, *img_size, in_channels] to logits [B, *img_size, out_channels]."""
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Dropout(0.5)(x, deterministic=not train)
        return nn.Dense(self.config.out_channels)(x)
