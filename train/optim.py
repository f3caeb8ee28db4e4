"""AdamW, or Muon for matrices and kernels, with warm-up and a schedule of the learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from unetr_flax import ops

# Exponent of the "poly" schedule in nnU-Net (Isensee et al. 2021, Methods).
POLY_POWER = 0.9

OPTIMIZERS = ("adamw", "muon")

# The values of --schedule: (peak rate, steps of the decay) -> the rate after the warm-up.
SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    # Loshchilov & Hutter 2017 (SGDR, equation 5) without restarts.
    "cosine": optax.cosine_decay_schedule,
    # Chen et al. 2018 (DeepLab, section 4.1), as in nnU-Net.
    "poly": lambda peak, steps: optax.polynomial_schedule(peak, 0.0, POLY_POWER, steps),
    "constant": lambda peak, steps: optax.constant_schedule(peak),
}


def learning_rate_schedule(
    peak: float, total_steps: int, warmup_fraction: float, decay: str = "cosine"
) -> optax.Schedule:
    """Makes a schedule that rises linearly to `peak`, then decays.

    The warm-up is that of Goyal et al. 2017, section 2.2. The first step's rate is already above 0,
    so that no step is lost.

    Args:
      peak: highest learning rate.
      total_steps: number of optimizer steps of the run.
      warmup_fraction: share of the steps that the warm-up takes.
      decay: name of the decay in `SCHEDULES`.
    """
    warmup = max(1, round(total_steps * warmup_fraction))
    decayed = SCHEDULES[decay](peak, max(1, total_steps - warmup + 1))

    def schedule(count: Any) -> jax.Array:
        step = jnp.asarray(count + 1, jnp.float32)
        # The argument of a decay must not be negative: a power of it would be nan.
        after = jnp.maximum(step - warmup, 0)
        return jnp.where(step < warmup, peak * step / warmup, decayed(after))

    return schedule


def make_optimizer(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    clip_norm: float,
    layer_decay: float = 1.0,
    b2: float = 0.999,
    optimizer: str = "adamw",
) -> optax.GradientTransformation:
    """Makes AdamW (Loshchilov & Hutter 2019, algorithm 2) with clipping by the global norm.

    Or Muon (Jordan et al. 2024), which makes the update of each matrix nearly orthogonal, for the
    kernels of linear maps and convolutions; all else, and the head, has AdamW with Nesterov's
    momentum. Updates of matrices have a root mean square of 0.2, about that of AdamW's, so learning
    rates for AdamW suit them (Liu et al. 2025, section 2.2).

    Args:
      schedule: learning rate as a function of the step.
      weight_decay: decoupled decay, multiplied by the learning rate; applied to kernels only.
      clip_norm: gradients with a larger global norm are scaled down to it (Pascanu et al. 2013,
        algorithm 1).
      layer_decay: factor of the learning rate from layer to layer, see `layer_scales`.
      b2: decay of AdamW's average of squared gradients.
      optimizer: one of `OPTIMIZERS`.
    """
    if optimizer == "muon":
        # Its own decay has no mask for what AdamW updates. Updates point downhill already.
        update = optax.chain(
            muon(1.0, adam_b2=b2, muon_weight_dimension_numbers=matrices, consistent_rms=0.2),
            optax.add_decayed_weights(-weight_decay, mask=decay_mask),
            optax.scale_by_schedule(schedule),
        )
    else:
        update = optax.adamw(schedule, b2=b2, weight_decay=weight_decay, mask=decay_mask)
    transforms = [
        clip_by_global_norm(clip_norm),
        update,
    ]
    if layer_decay != 1:

        def scale(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
            del params
            scales = layer_scales(updates, layer_decay)
            return jax.tree.map(lambda update, x: update * x, updates, scales)

        transforms.append(optax.stateless(scale))
    return optax.chain(*transforms)


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


def matrices(params: optax.Params) -> Any:
    """Says which axes of each kernel are a matrix's rows and columns; None for what has AdamW.

    A kernel maps inputs to outputs. A convolution's inputs are all voxels and channels that it
    sees, its outputs one voxel's channels; in a transposed convolution it is the other way round;
    queries, keys and values of all heads are outputs together. The head is left to AdamW, as Jordan
    et al. 2024 leave the last layer of their models.
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        names = [key.key for key in path]
        if names[-1] != "kernel" or "head" in names:
            return None
        # A skip has a kernel itself if it is nothing but a transposed convolution.
        if names[-2] in ("upsample", "deconv") or names[-2].startswith("skip_"):
            inputs = (leaf.ndim - 2,)
        else:
            inputs = (0,) if names[-2] == "qkv" else tuple(range(leaf.ndim - 1))
        outputs = tuple(axis for axis in range(leaf.ndim) if axis not in inputs)
        return MuonDimensionNumbers(inputs, outputs)

    return jax.tree_util.tree_map_with_path(axes, params)


def layer_scales(params: Any, layer_decay: float) -> Any:
    """Computes the factor of each leaf's learning rate: lower for the encoder's earlier layers.

    This is the layer-wise decay of Clark et al. 2020 (ELECTRA, appendix A) and Bao et al. 2022
    (BEiT, section 3.1), by which a pretrained encoder keeps what it has learned: with L blocks, the
    decoder and the encoder's last norm have factor 1, block i of 0 ... L - 1 has
    `layer_decay ** (L - i)`, and the patch embedding has `layer_decay ** (L + 1)`.

    Args:
      params: the parameters of a UNETR.
      layer_decay: the factor from each layer to the one before it.
    """
    names = [str(name) for name in params.get("encoder", {})]
    num_blocks = sum(name.startswith("block_") for name in names)

    def scale(path: tuple[Any, ...], _: Any) -> float:
        part, layer = path[0].key, path[1].key
        if part != "encoder" or layer == "norm":
            return 1.0
        depth = 0 if layer == "embedding" else 1 + int(layer.removeprefix("block_"))
        return layer_decay ** (num_blocks + 1 - depth)

    return jax.tree_util.tree_map_with_path(scale, params)
