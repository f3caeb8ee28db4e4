"""The Flax sides of a race: this project, and the same model without its own lowering."""

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
from benchmarks.roofline import Cost, cost_of
from train.losses import dice_cross_entropy_loss
from train.state import initial_state
from train.step import make_predict, make_train_step
from unetr_flax import UNETR, ops
from unetr_flax.model import blocks, encoder
from unetr_flax.runtime.aot import aot_compile
from unetr_flax.runtime.cudnn import refuse_wrong_convolutions
from unetr_flax.weights import from_torch


class FlaxSide:
    """Runs forward passes and training steps of one model.

    Args:
      case: the model and its input.
      state_dict: the weights, as a PyTorch state dict.
      image: image [B, *img_size, C].
      labels: class of each voxel, [B, *img_size].
      learning_rate: learning rate of AdamW.
      remat: whether to compute activations again in the backward pass.

    Raises:
      CudnnError: if this machine's cuDNN computes wrongly in the case's dtype.
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
        refuse_wrong_convolutions(case.dtype)
        self.device = jax.default_backend()
        cfg = case.cfg
        model = UNETR(cfg, dtype=jnp.dtype(case.dtype), remat=remat)
        variables = jax.tree.map(jnp.asarray, from_torch(state_dict, cfg))
        update = optax.adamw(learning_rate)
        self._state = initial_state(variables, update, jax.random.key(0))
        self._functions = {
            "forward": make_predict(model),
            "step": make_train_step(model, update, dice_cross_entropy_loss),
        }
        self._compiled: dict[str, jax.stages.Compiled] = {}
        self._batch = {"image": jnp.asarray(image), "label": jnp.asarray(labels)}

    def forward(self) -> jax.Array:
        """Computes logits [B, *img_size, K] in evaluation mode; they stay on the device."""
        return jax.block_until_ready(self._program("forward")(*self._arguments("forward")))

    def step(self) -> float:
        """Takes a training step and returns its loss."""
        self._state, metrics = self._program("step")(*self._arguments("step"))
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def to_host(self, logits: jax.Array) -> np.ndarray:
        """Copies logits of `forward` to the host, as float32."""
        return np.asarray(logits, np.float32)

    def cost(self, what: str) -> Cost | None:
        """Returns XLA's figures for the program of "forward" or "step"."""
        return cost_of(self._functions[what], self._program(what), *self._arguments(what))

    def peak_of_step(self) -> int | None:
        """Takes a step and returns the accelerator's peak of bytes in use so far; None on CPU."""
        self.step()
        statistics = jax.devices()[0].memory_stats()
        return statistics and statistics.get("peak_bytes_in_use")

    def _arguments(self, what: str) -> tuple[Any, ...]:
        if what == "forward":
            return self._state.variables, self._batch["image"]
        return self._state, self._batch

    def _program(self, what: str) -> jax.stages.Compiled:
        if what not in self._compiled:
            self._compiled[what] = aot_compile(self._functions[what], *self._arguments(what))
        return self._compiled[what]


@contextlib.contextmanager
def plain_modules() -> Iterator[None]:
    """The model in modules as Flax has them, lowered by XLA alone."""

    def attention(query, key, value, mask=None, *, scale):
        return ops.weighted_values(ops.attention_weights(query, key, mask, scale=scale), value)

    class Conv(nn.Conv):
        def __call__(self, x, keep=False):
            del keep  # XLA decides
            return super().__call__(ops.joined(x))

    class ConvTranspose(nn.ConvTranspose):
        def __call__(self, x, deferred):
            del deferred  # it is computed here
            return super().__call__(x)

    class BatchNorm(nn.Module):
        affine: bool = True
        negative_slope: float = 1.0
        dtype: Any = None
        param_dtype: Any = jnp.float32

        @nn.compact
        def __call__(self, x, *, train=False, deferred=False):
            del deferred  # it is computed here
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
            return nn.leaky_relu(norm(x), self.negative_slope)

    class GroupNorm(nn.Module):
        num_groups: int | None = None
        affine: bool = True
        negative_slope: float = 1.0
        dtype: Any = None
        param_dtype: Any = jnp.float32

        @nn.compact
        def __call__(self, x, *, deferred=False):
            del deferred  # it is computed here
            norm = nn.GroupNorm(
                self.num_groups,
                1 if self.num_groups is None else None,
                epsilon=1e-5,
                use_fast_variance=False,
                use_scale=self.affine,
                use_bias=self.affine,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )
            nn.share_scope(self, norm)
            return nn.leaky_relu(norm(x), self.negative_slope)

    native = {
        "Conv": Conv,
        "ConvTranspose": ConvTranspose,
        "dot_general": lax.dot_general,
        "dot_product_attention": attention,
        "gradient_once": lambda x: x,
    }
    plain = types.SimpleNamespace(**{**vars(ops), **native})

    with (
        mock.patch.object(blocks, "ops", plain),
        mock.patch.object(encoder, "ops", plain),
        mock.patch.object(blocks, "BatchNorm", BatchNorm),
        mock.patch.object(blocks, "GroupNorm", GroupNorm),
        jaxprs_forgotten(),
    ):
        yield


@contextlib.contextmanager
def jaxprs_forgotten() -> Iterator[None]:
    """Clears JAX's caches on entry and exit, so that no trace is shared with the code within."""
    jax.clear_caches()
    try:
        yield
    finally:
        jax.clear_caches()
