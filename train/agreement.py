"""What any process of a run wishes, all of them do, at the same step."""

import collections
import functools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Calls between a wish and its fulfillment, so that no process waits for the step on its device.
LAG = 1


class Agreement:
    """Collects wishes of all processes, which must call it equally often and in step.

    Args:
      number: number of wishes.
    """

    def __init__(self, number: int):
        self._number = number
        self._alone = jax.process_count() == 1
        self._asked: collections.deque[jax.Array] = collections.deque()

    def __call__(self, *wishes: bool) -> tuple[bool, ...]:
        """Takes this process's wishes and returns those that any process had `LAG` calls ago.

        A process that is alone gets its own wishes back at once.
        """
        if self._alone:
            return wishes
        mine = np.tile(np.array(wishes, np.int32), (jax.local_device_count(), 1))
        self._asked.append(_any(jax.make_array_from_process_local_data(_sharding(), mine)))
        if len(self._asked) <= LAG:
            return (False,) * self._number
        return tuple(bool(x) for x in np.asarray(self._asked.popleft()))

    def forget(self) -> None:
        """Drops the wishes that are on their way; every process must call it."""
        self._asked.clear()


@functools.cache
def _sharding() -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()), ("devices",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("devices"))


def _any(wishes: jax.Array) -> jax.Array:
    """Computes for each wish whether any device's process has it, int32 [number]."""
    return _maximum()(wishes)


@functools.cache
def _maximum():
    everywhere = NamedSharding(_sharding().mesh, PartitionSpec())
    return jax.jit(lambda x: x.max(0), out_shardings=everywhere)
