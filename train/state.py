"""Everything that one optimization step changes, as one pytree."""

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
    """What is donated to a step, sharded, and checkpointed.

    Attributes:
      step: steps taken so far, int32 [].
      params: the model's parameters.
      batch_stats: running statistics of its norms.
      opt_state: state of the optimizer.
      rng: data of the key from which each step derives its own for dropout, uint32 [2]; not a key
        itself, so that a state is plain arrays for whoever places, copies or stores it.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    rng: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def initial_state(
    variables: Mapping[str, Any], tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """The state before the first step.

    Args:
      variables: of a UNETR.
      tx: the optimizer.
      key: of all dropout.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        # Only batch norms have any.
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
        rng=jax.random.key_data(key),
    )


def create_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    seed: int,
    sharding: Sharding | None = None,
) -> TrainState:
    """A fresh state; equal seeds give equal states.

    Args:
      model: a UNETR.
      tx: the optimizer.
      seed: of the parameters and of all dropout.
      sharding: where the state lives; the compiler decides if None.
    """
    create = functools.partial(_create, model, tx, seed)
    return jax.jit(create, out_shardings=sharding, compiler_options=compiler_options())()


def abstract_state(
    model: nn.Module, tx: optax.GradientTransformation, sharding: Sharding
) -> TrainState:
    """Shapes, dtypes and shardings of a state, computed without one: what restoring needs."""
    shapes = jax.eval_shape(functools.partial(_create, model, tx, 0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _create(model: nn.Module, tx: optax.GradientTransformation, seed: int) -> TrainState:
    init_key, rng = jax.random.split(jax.random.key(seed))
    cfg = model.config
    image = jnp.zeros((1, *cfg.img_size, cfg.in_channels), model.param_dtype)
    return initial_state(model.init(init_key, image), tx, rng)
