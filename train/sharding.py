"""How the arrays of a run are split over all devices of all processes.

The devices are a mesh of three axes:
  data   splits the batch; it takes all devices that the other axes leave
  fsdp   splits the batch too, and the parameters with the optimizer's state (`--fsdp`)
  depth  splits the first spatial axis of volumes (`--depth-shards`)
The model knows nothing of devices: under `jax.jit` a sharded batch is one batch, and the compiler
inserts the communication, including that of batch statistics. `ops.sharded_volumes` chooses
operations that exchange no more of a volume than the slices at the borders.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unetr_flax import ops

DATA, FSDP, DEPTH = AXES = ("data", "fsdp", "depth")
# Names of the arrays that fsdp splits; the others are too small to be worth an exchange.
SPLIT_BY_FSDP = ("kernel", "position_embedding")


def make_mesh(fsdp: int = 1, depth_shards: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices along the three axes.

    Args:
      fsdp: devices that share the parameters.
      depth_shards: devices that share a volume.
      devices: the devices; all of all processes if None.

    Raises:
      ValueError: if the number of devices is not divisible by both together.
    """
    count = jax.device_count() if devices is None else len(devices)
    together = fsdp * depth_shards
    if count % together:
        raise ValueError(
            f"--fsdp {fsdp} --depth-shards {depth_shards}: their product must divide the number of "
            f"devices, {count}"
        )
    shape = (count // together, fsdp, depth_shards)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that the mesh splits a batch into."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def described(mesh: Mesh) -> str:
    """Says in words which devices a mesh has."""
    axes = {FSDP: "that share the parameters", DEPTH: "that share a volume"}
    words = [f"{mesh.shape[axis]} {use}" for axis, use in axes.items() if mesh.shape[axis] > 1]
    devices = f"{mesh.size} {jax.default_backend()} device(s)"
    return f"{devices} ({', '.join(words)})" if words else devices


def check_fits(mesh: Mesh, batch_size: int, accumulate: int, grid_depth: int | None) -> None:
    """Checks that volumes and batches can be split as the mesh says.

    Args:
      mesh: see `make_mesh`.
      batch_size: volumes per step.
      accumulate: number of parts of a batch that are computed one after the other.
      grid_depth: patches of a volume along its first axis; None if not known yet.

    Raises:
      ValueError: naming the option, its value and what is allowed.
    """
    depth, shards = mesh.shape[DEPTH], batch_shards(mesh)
    if batch_size % (shards * accumulate):
        split = f"{mesh.size}" + (f" / --depth-shards {depth}" if depth > 1 else "")
        parts = f" times --accumulate {accumulate}" if accumulate > 1 else ""
        raise ValueError(
            f"--batch-size {batch_size}: must be divisible by the number of devices, {split}"
            f"{parts}; use fewer devices, let several share a volume by --depth-shards, or start a "
            "new run with another --batch-size"
        )
    if grid_depth is not None and grid_depth % depth:
        raise ValueError(
            f"--depth-shards {depth}: must divide the {grid_depth} patches that a volume has along "
            "its first axis, --roi-size over --patch-size"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a full copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of volumes [B, D, ...]: the batch split, and the depth."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP), DEPTH))


def parameter_spec(path: tuple[Any, ...], shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Returns how fsdp splits an array of the training state: the policy for all of them.

    The optimizer's moments and averages of parameters are split as these are, since their paths end
    with the same name.

    Args:
      path: path of the array in the state, as of `jax.tree_util.tree_map_with_path`.
      shape: its shape.
      fsdp: size of the mesh's axis.

    Returns:
      The largest axis that is divisible, the last one of equals, or nothing is split.
    """
    name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or name not in SPLIT_BY_FSDP or not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(FSDP if axis == largest else None for axis in range(len(shape))))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a training state, or of any tree of its arrays."""
    fsdp = mesh.shape[FSDP]
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, parameter_spec(path, x.shape, fsdp)), state
    )


def with_sharding(abstract: Any, mesh: Mesh) -> Any:
    """Returns the shapes and dtypes of a state with its shardings, for compiling and restoring."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        state_sharding(abstract, mesh),
    )


@contextlib.contextmanager
def lowered_for(mesh: Mesh | None) -> Iterator[None]:
    """Makes the operations that are traced within it suit the mesh; None changes nothing."""
    volumes = None
    # The compiler splits the batch alone as well as it can be.
    if mesh is not None and mesh.shape[FSDP] * mesh.shape[DEPTH] > 1:
        volumes = ops.VolumeSharding(mesh, (DATA, FSDP), DEPTH)
    with ops.sharded_volumes(volumes):
        yield


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns which of how many equal shares of a batch this process must load.

    Processes whose devices have parts of the same volumes load the same share.

    Raises:
      ValueError: if the shares are not equal, or this process has parts of several.
    """
    parts = batch_shards(mesh)
    rows = mesh.devices.reshape(parts, -1)
    mine = {i for i in range(parts) if any(_is_here(device) for device in rows[i])}
    first, share = min(mine), len(mine)
    if parts % share or first % share or mine != set(range(first, first + share)):
        raise ValueError(
            f"devices of a process have the parts {sorted(mine)} of {parts} of a batch"
        )
    return first // share, parts // share


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's share of a batch on its devices.

    Args:
      batch: arrays [b, D, ...], the share that `batch_share` names.
      mesh: see `make_mesh`.

    Returns:
      The global batch [b * shares, D, ...], split over all devices.
    """
    sharding = batch_sharding(mesh)
    which, of = batch_share(mesh)

    def place(own):
        start = which * len(own)

        def part(index):
            rows, *rest = index
            first, last, _ = rows.indices(of * len(own))
            return own[(slice(first - start, last - start), *rest)]

        return jax.make_array_from_callback((of * len(own), *own.shape[1:]), sharding, part)

    return {name: place(array) for name, array in batch.items()}


def local_copy(tree: Any) -> Any:
    """Returns full copies of the arrays on this process's first device.

    Every process must call it. Other processes need not take part in computations with the copies.
    """
    leaves = jax.tree.leaves(tree)
    if not all(x.is_fully_replicated for x in leaves):
        tree = jax.jit(lambda x: x, out_shardings=replicated(leaves[0].sharding.mesh))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def _is_here(device: Any) -> bool:
    return device.process_index == jax.process_index()
