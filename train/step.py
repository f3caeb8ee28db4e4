"""The jitted training step."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, Sharding

from train.losses import Loss
from train.sharding import gathered, lowered_for
from train.state import TrainState
from unetr_flax import UNETRConfig, ops
from unetr_flax.runtime.compiler_options import compiler_options

Batch = Mapping[str, jax.Array]


def abstract_batch(
    cfg: UNETRConfig, batch_size: int, sharding: Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and sharding of the batch that a training step takes."""
    shapes = {
        "image": ((batch_size, *cfg.img_size, cfg.in_channels), jnp.float32),
        "label": ((batch_size, *cfg.img_size), jnp.int32),
    }
    return {k: jax.ShapeDtypeStruct(*v, sharding=sharding) for k, v in shapes.items()}


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss: Loss,
    sharding: Any = None,
    platform: str | None = None,
    *,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `train_step(state, batch) -> (state, metrics)`.

    The step is compiled once for each shape of the batch. The buffers of the given state are
    donated to the new state, so the old state must not be used again. The step does not wait for
    the device: the metrics stay there until they are read.

    Args:
      model: a UNETR.
      tx: the optimizer.
      loss: (logits [B, *spatial, K], labels [B, *spatial]) -> scalar.
      sharding: where the new state and the metrics live, as `jax.jit` takes it: one sharding, or
        one for each array; the compiler decides if None.
      platform: "cpu", "gpu" or "tpu", on which the step will run; JAX's default if None.
      mesh: the devices, if parameters or depth are split over some of them; see `train.sharding`.

    Returns:
      The step. Its batch has "image" [B, *img_size, C] and "label", integers [B, *img_size]; its
      metrics, scalars, are "loss" and "grad_norm", the global norm of the gradient before clipping.
    """

    platform = platform or jax.default_backend()

    @ops.target_platform(platform)
    @lowered_for(mesh)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        dropout_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def objective(params):
            logits, updates = model.apply(
                {"params": gathered(params, mesh), "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            return loss(logits, batch["label"]), updates.get("batch_stats", {})

        (value, batch_stats), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new_state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return new_state, {"loss": value, "grad_norm": ops.global_norm(grads)}

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=sharding,
        compiler_options=compiler_options(platform),
    )
