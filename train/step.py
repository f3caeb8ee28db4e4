"""The jitted training step."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, Sharding

from train.ema import update_average
from train.losses import Loss
from train.sharding import lowered_for
from train.state import TrainState
from unetr_flax import UNETRConfig, ops
from unetr_flax.runtime.compiler_options import compiler_options

Batch = Mapping[str, jax.Array]
# (keys [B], images [B, *spatial, C], labels [B, *spatial]) -> images and labels of these shapes.
Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# Separates the keys of augmentation from those of dropout.
AUGMENT_KEY = 1


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
    augment: Augment | None = None,
    accumulate: int = 1,
    ema_decay: float = 0.0,
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
      augment: changes images and labels at random, see `train.data.augment`.
      accumulate: number of equal parts of the batch that are computed one after the other, for less
        memory. Loss and gradient are the means over the parts; each part has batch statistics of
        its own, with which the running ones are updated in turn.
      ema_decay: decay of the state's average of the variables, see `train.ema`; used if the state
        has one.

    Returns:
      The step. Its batch has "image" [B, *img_size, C] and "label", integers [B, *img_size]; its
      metrics, scalars, are "loss", "grad_norm", the global norm of the gradient before clipping,
      and "skipped", whether one of the two is not finite: such a step changes no parameter.
    """

    platform = platform or jax.default_backend()

    def value_and_gradient(params, batch_stats, batch, key):
        def objective(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                batch["image"],
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return loss(logits, batch["label"]), updates.get("batch_stats", {})

        (value, updated), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return value, updated, grads

    def accumulated(params, batch_stats, batch, key):
        def add(carry, part):
            total, batch_stats = carry
            number, batch = part
            part_key = jax.random.fold_in(key, number)
            value, batch_stats, grads = value_and_gradient(params, batch_stats, batch, part_key)
            return (jax.tree.map(jnp.add, total, (value, grads)), batch_stats), None

        parts = jax.tree.map(lambda x: _split(x, accumulate), batch)
        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        carry, _ = jax.lax.scan(add, (zeros, batch_stats), (jnp.arange(accumulate), parts))
        total, batch_stats = carry
        value, grads = jax.tree.map(lambda x: x / accumulate, total)
        return value, batch_stats, grads

    @ops.target_platform(platform)
    @lowered_for(mesh)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        batch = dict(batch)
        if augment is not None:
            keys = jax.random.split(jax.random.fold_in(key, AUGMENT_KEY), batch["label"].shape[0])
            batch["image"], batch["label"] = augment(keys, batch["image"], batch["label"])
        gradient = value_and_gradient if accumulate == 1 else accumulated
        value, batch_stats, grads = gradient(state.params, state.batch_stats, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        grad_norm = ops.global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        new_state = state.replace(
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        if state.average is not None:
            average = update_average(state.average, new_state.variables, state.step, ema_decay)
            new_state = new_state.replace(average=average)
        # A step that is not finite changes nothing but the number of steps.
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)
        new_state = new_state.replace(step=state.step + 1)
        return new_state, {"loss": value, "grad_norm": grad_norm, "skipped": ~finite}

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=sharding,
        compiler_options=compiler_options(platform),
    )


def _split(x: jax.Array, parts: int) -> jax.Array:
    """Splits a batch [B, ...] into [parts, B / parts, ...].

    Each part takes rows from all over the batch, so that a batch that is split over devices need
    not move between them.
    """
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
