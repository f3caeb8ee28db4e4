"""AdamW with warm-up and cosine decay, the optimizer of vision transformers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from unetr_flax import ops


def learning_rate_schedule(peak: float, total_steps: int, warmup_fraction: float) -> optax.Schedule:
    """Makes a schedule that rises linearly to `peak`, then falls as a half cosine to 0.

    The decay is that of Loshchilov & Hutter 2017 (SGDR, equation 5) without restarts; the warm-up
    is that of Goyal et al. 2017, section 2.2. The first step's rate is already above 0, so that no
    step is lost.

    Args:
      peak: highest learning rate.
      total_steps: number of optimizer steps of the run.
      warmup_fraction: share of the steps that the warm-up takes.
    """
    warmup = max(1, round(total_steps * warmup_fraction))
    cosine = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup + 1))

    def schedule(count: Any) -> jax.Array:
        step = jnp.asarray(count + 1, jnp.float32)
        return jnp.where(step < warmup, peak * step / warmup, cosine(step - warmup))

    return schedule


def make_optimizer(
    schedule: optax.Schedule, *, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Makes AdamW (Loshchilov & Hutter 2019, algorithm 2) with clipping by the global norm.

    Args:
      schedule: learning rate as a function of the step.
      weight_decay: decoupled decay, multiplied by the learning rate; applied to kernels only.
      clip_norm: gradients with a larger global norm are scaled down to it (Pascanu et al. 2013,
        algorithm 1).
    """
    return optax.chain(
        clip_by_global_norm(clip_norm),
        optax.adamw(schedule, weight_decay=weight_decay, mask=decay_mask),
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips as `optax.clip_by_global_norm`, by the norm that `train.step` computes as a metric.

    XLA then computes this norm once.
    """

    def clip(grads: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        del params
        norm = ops.global_norm(grads)
        factor = jnp.where(norm < max_norm, 1, max_norm / norm)
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return optax.stateless(clip)


def decay_mask(params: optax.Params) -> optax.Params:
    """Marks the leaves that decay: the kernels of convolutions and linear maps.

    Biases, scales of norms and position embeddings do not decay, as in the training code of BERT
    and ViT: they are few, and shrinking them regularizes nothing.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
