"""The train state: everything that one optimization step changes, as one pytree."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from unetr_flax.runtime.compiler_options import compiler_options


class TrainState(flax.struct.PyTreeNode):
    """The state that a step takes and returns, and a checkpoint holds.

    Attributes:
      step: steps taken so far, int32 [].
      params: the model's parameters.
      batch_stats: running statistics of its norms.
      opt_state: state of the optimizer.
      rng: data of the key from which each step derives its own keys for dropout and augmentation,
        uint32 [2]. The key is not a typed one, so that a state is made of plain arrays, which can
        be stored as they are.
      average: moving averages of `variables`, see `train.ema`; None if none are kept.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    rng: jax.Array
    average: dict[str, Any] | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def initial_state(
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    averaged: bool = False,
) -> TrainState:
    """Makes the state before the first step.

    Args:
      variables: "params" and perhaps "batch_stats" of a UNETR.
      tx: the optimizer.
      key: the key for dropout and augmentation in all steps.
      averaged: whether a moving average of the variables is kept.
    """
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        # Only batch norms have running statistics.
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
        rng=jax.random.key_data(key),
    )
    # Copies, since a step donates each buffer of the state, which must occur there once.
    return state.replace(average=jax.tree.map(jnp.copy, state.variables)) if averaged else state


def create_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    seed: int,
    sharding: Any = None,
    *,
    averaged: bool = False,
) -> TrainState:
    """Makes a state with random parameters; equal seeds give equal states.

    Args:
      model: a UNETR.
      tx: the optimizer.
      seed: determines the parameters and all dropout, in [0, 2**32).
      sharding: where the state lives, one sharding or one for each array; the compiler decides
        if None.
      averaged: whether a moving average of the variables is kept.
    """
    create = functools.partial(_create, model, tx, seed, averaged)
    return jax.jit(create, out_shardings=sharding, compiler_options=compiler_options())()


def abstract_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    sharding: Sharding,
    *,
    averaged: bool = False,
) -> TrainState:
    """Returns shapes, dtypes and shardings of a state without computing it, for restoring."""
    shapes = jax.eval_shape(functools.partial(_create, model, tx, 0, averaged))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _create(
    model: nn.Module, tx: optax.GradientTransformation, seed: int, averaged: bool
) -> TrainState:
    init_key, rng = jax.random.split(jax.random.key(seed))
    cfg = model.config
    image = jnp.zeros((1, *cfg.img_size, cfg.in_channels), model.param_dtype)
    return initial_state(model.init(init_key, image), tx, rng, averaged=averaged)
