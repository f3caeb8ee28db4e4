"""Where arrays live: the batch split over all devices, everything else on each of them.

This is the only file that knows of devices and processes. Under `jax.jit` a sharded batch is still
one batch, so the model needs to know of neither: the compiler puts in the communication, also that
of batch statistics.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


class MainProcessError(RuntimeError):
    """The main process has failed, and says why itself."""


def connect(coordinator_address: str, num_processes: int, process_id: int) -> None:
    """Joins this process with the others of a run; call before anything else touches a device.

    Args:
      coordinator_address: host:port where process 0 listens.
      num_processes: processes of the run.
      process_id: which one this is, from 0.
    """
    jax.distributed.initialize(coordinator_address, num_processes, process_id)


def make_mesh() -> Mesh:
    """All devices of all processes along one axis."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's share [b, ...] of a batch on its devices.

    Returns:
      The global batch [b * processes, ...], its first axis split over all devices.
    """
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def local_copy(tree: Any) -> Any:
    """This process's copy of replicated arrays, on its first device, free to be used alone."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def windows_per_call() -> int:
    """Windows that inference gives the model at once: a CPU gains nothing from more than one."""
    return 1 if jax.default_backend() == "cpu" else 4


def process_sum(values: np.ndarray) -> np.ndarray:
    """The sum over processes of integer arrays of one shape; every process must call it."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.process_allgather(values)).sum(0)


def any_process(flag: bool) -> bool:
    """Whether any process raises its flag; every process must call it."""
    return bool(process_sum(np.array(flag, np.int32)))


def run_on_main(action: Callable[[], None]) -> None:
    """Runs an action on the main process while the others wait; where it fails, all fail.

    Raises:
      Exception: on the main process what the action raises.
      MainProcessError: on the others, if it does.
    """
    error = None
    if is_main():
        try:
            action()
        except BaseException as e:
            error = e
    if any_process(error is not None):
        raise error or MainProcessError("process 0 has failed and says why")


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0
