"""The exponential moving average of a model's weights, a second candidate for the best model."""

from typing import Any

import jax
import jax.numpy as jnp

from train.state import TrainState


def update_average(average: Any, variables: Any, step: jax.Array, decay: float) -> Any:
    """Moves an average towards the variables after a step (Polyak & Juditsky 1992).

    The average of the last steps lies nearer to a minimum than the noisy weights themselves
    (Tarvainen & Valpola 2017, section 2). Running statistics of norms are averaged like parameters.
    The decay grows with the step, as in TensorFlow's `ExponentialMovingAverage`, so that the random
    initial parameters are soon forgotten.

    Args:
      average: the average so far.
      variables: the variables after the step, of the same structure.
      step: number of steps taken before this one, int [].
      decay: weight of the average so far, once `step` is large.
    """
    step = step.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(
        lambda old, new: old + (new - old) * share.astype(old.dtype), average, variables
    )


def candidates(state: TrainState) -> dict[str, TrainState]:
    """Returns the states whose variables compete for the best model, by the kind of their records.

    The state itself is first; the second, if averages are kept, has them as its variables.
    """
    if state.average is None:
        return {"validation": state}
    params, batch_stats = state.average["params"], state.average["batch_stats"]
    return {
        "validation": state,
        "validation_average": state.replace(params=params, batch_stats=batch_stats),
    }
