"""The Flax sides of a race: this project, tuned and by plain definitions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cases import Case
from benchmarks.roofline import Cost, cost_of
from train.losses import dice_cross_entropy_loss
from train.state import initial_state
from train.step import make_train_step
from unetr_flax import UNETR
from unetr_flax.inference.predictor import make_predict
from unetr_flax.ops import Lowering
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
      lowering: "auto" or "xla", see `UNETR`.

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
        lowering: Lowering = "auto",
    ):
        refuse_wrong_convolutions(case.dtype)
        self.device = jax.default_backend()
        cfg = case.cfg
        model = UNETR(
            cfg, dtype=jnp.dtype(case.dtype), remat=remat, lowering=lowering, jit_blocks=True
        )
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
