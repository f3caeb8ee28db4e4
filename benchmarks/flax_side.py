"""The sides of a race that are Flax's: ours, and the same model in plain modules."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks.cases import Case
from train.losses import dice_cross_entropy_loss
from train.state import TrainState
from train.step import make_predict, make_train_step
from unetr_flax import UNETR, blocks, encoder
from unetr_flax.weights import from_torch


class FlaxSide:
    """Forward passes and training steps of one model.

    Args:
      case: which model and input.
      state_dict: the weights, as PyTorch's.
      image: [B, *img_size, C].
      labels: [B, *img_size].
      learning_rate: of AdamW.
      remat: whether to compute activations again in the backward pass.
    """

    def __init__(
        self,
        case: Case,
        state_dict: dict[str, Any],
        image: np.ndarray,
        labels: np.ndarray,
        learning_rate: float,
        *,
        remat: bool = False,
    ):
        cfg = case.cfg
        model = UNETR(cfg, dtype=jnp.dtype(case.dtype), remat=remat)
        variables = jax.tree.map(jnp.asarray, from_torch(state_dict, cfg))
        update = optax.adamw(learning_rate)
        self._state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=update.init(variables["params"]),
            rng=jax.random.key_data(jax.random.key(0)),
        )
        self._predict = make_predict(model)
        self._train_step = make_train_step(model, update, dice_cross_entropy_loss)
        self._batch = {"image": jnp.asarray(image), "label": jnp.asarray(labels)}

    def forward(self) -> np.ndarray:
        """Logits [B, *img_size, K] in evaluation mode."""
        logits = self._predict(self._state.variables, self._batch["image"])
        return np.asarray(jax.block_until_ready(logits), np.float32)

    def step(self) -> float:
        """Takes a training step; its loss."""
        self._state, metrics = self._train_step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])


@contextlib.contextmanager
def plain_modules() -> Iterator[None]:
    """The model in modules as Flax has them, lowered by XLA alone."""
    plain = types.SimpleNamespace(
        conv_general_dilated=lax.conv_general_dilated, ConvTranspose=nn.ConvTranspose
    )

    class BatchNorm(nn.Module):
        dtype: Any = None
        param_dtype: Any = jnp.float32
        affine: bool = True

        @nn.compact
        def __call__(self, x, *, train=False, **_):
            norm = nn.BatchNorm(
                not train,
                momentum=0.9,
                epsilon=1e-5,
                use_fast_variance=False,
                use_scale=self.affine,
                use_bias=self.affine,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )
            nn.share_scope(self, norm)
            return norm(x)

    with (
        mock.patch.object(blocks, "ops", plain),
        mock.patch.object(encoder, "ops", plain),
        mock.patch.object(blocks, "BatchNorm", BatchNorm),
    ):
        yield
