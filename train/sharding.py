"""Placement of arrays: the batch is split over all devices, everything else is copied to each.

The model knows nothing of devices: under `jax.jit` a sharded batch is one batch, and the compiler
inserts the communication, including that of the batch statistics.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def make_mesh() -> Mesh:
    """Arranges all devices of all processes along one axis."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a full copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's shard of a batch on its devices.

    Args:
      batch: arrays [b, ...], the same b in each process.
      mesh: see `make_mesh`.

    Returns:
      The global batch [b * processes, ...], its first axis split over all devices.
    """
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def local_copy(tree: Any) -> Any:
    """Returns the copies of replicated arrays on this process's first device.

    Other processes need not take part in computations with them.
    """
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
