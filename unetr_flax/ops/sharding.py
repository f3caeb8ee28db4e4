"""Volumes that are split over devices, and what these devices exchange.

Within `sharded_volumes` each tuned operation runs on every device by itself, in `jax.shard_map`, on
that device's samples and slices. Where depth is split, a 3x3x3 convolution first gets one slice
from each neighbor (a halo), and attention the keys and values of all tokens of its volumes. Sums
over volumes are added up over the devices. Left to itself, the compiler would gather whole feature
maps wherever an operation merges depth with the batch, or where parameters are split as well.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The spec of arrays of which every device has a full copy: kernels, biases, totals.
COPIED = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class VolumeSharding:
    """How volumes [N, D, *spatial, C], and tokens [N, tokens, C], are split over devices.

    Attributes:
      mesh: the devices.
      batch_axes: axes of the mesh that split N.
      depth_axis: axis of the mesh that splits the second axis.
    """

    mesh: Mesh
    batch_axes: tuple[str, ...]
    depth_axis: str

    @property
    def count(self) -> int:
        """Number of devices that share a volume."""
        return self.mesh.shape[self.depth_axis]

    @property
    def volume(self) -> PartitionSpec:
        """The spec of volumes and tokens."""
        return PartitionSpec(self.batch_axes, self.depth_axis)

    @property
    def sample(self) -> PartitionSpec:
        """The spec of arrays [N, ...] that devices with parts of the same volume have copies of."""
        return PartitionSpec(self.batch_axes)

    def spec(self, x: jax.Array, batch: int) -> PartitionSpec:
        """Returns the spec of an operand of an elementwise operation on volumes.

        Args:
          x: a volume, or values that are broadcast to volumes: [N or 1, *ones, C] or [C].
          batch: N, the number of volumes.
        """
        by_sample = self.batch_axes if x.ndim > 1 and x.shape[0] == batch else None
        by_depth = self.depth_axis if x.ndim > 2 and x.shape[1] > 1 else None
        return PartitionSpec(by_sample, by_depth) if x.ndim > 1 else COPIED

    def total(self, tree: Any) -> Any:
        """Sums over the devices that share a volume; within `shard_map`."""
        return lax.psum(tree, self.depth_axis)

    def total_of_all(self, tree: Any) -> Any:
        """Sums over all devices; within `shard_map`."""
        return lax.psum(tree, (*self.batch_axes, self.depth_axis))

    def with_neighbors(self, x: jax.Array) -> jax.Array:
        """Adds the neighboring devices' nearest slices; within `shard_map`.

        Args:
          x: this device's slices, [N, D, ...].

        Returns:
          [N, D + 2, ...], with zeros beyond the volume; x itself if depth is not split.
        """
        if self.count == 1:
            return x
        before = lax.ppermute(x[:, -1:], self.depth_axis, self._downwards())
        after = lax.ppermute(x[:, :1], self.depth_axis, self._upwards())
        return jnp.concatenate([before, x, after], axis=1)

    def add_to_neighbors(self, x: jax.Array) -> jax.Array:
        """Adds the outermost slices to the neighbors', the transpose of `with_neighbors`.

        Args:
          x: [N, D + 2, ...].

        Returns:
          [N, D, ...]; what lies beyond the volume is dropped. x itself if depth is not split.
        """
        if self.count == 1:
            return x
        first = lax.ppermute(x[:, -1:], self.depth_axis, self._downwards())
        last = lax.ppermute(x[:, :1], self.depth_axis, self._upwards())
        return x[:, 1:-1].at[:, :1].add(first).at[:, -1:].add(last)

    def _downwards(self):
        return [(i, i + 1) for i in range(self.count - 1)]

    def _upwards(self):
        return [(i + 1, i) for i in range(self.count - 1)]


_SHARDING = jax.make_user_context(None)


@contextlib.contextmanager
def sharded_volumes(sharding: VolumeSharding | None) -> Iterator[None]:
    """Makes the operations traced within it, or in a function it decorates, run shard by shard.

    It concerns operations with lowering "auto". The arrays of the program must be split as the
    sharding says: the batch divisible by the batch axes' size, and the number of patches along
    depth by the depth axis' size.

    Args:
      sharding: how volumes are split; None leaves it to the compiler.
    """
    with _SHARDING(sharding):
        yield


def active() -> VolumeSharding | None:
    """Returns the sharding of the program that is being traced, None within an operation of it."""
    return _SHARDING.value


def by_shard(
    compute: Callable[..., Any], sharding: VolumeSharding, takes: Any, returns: Any
) -> Callable[..., Any]:
    """Returns a function that each device calls with its own parts of the arguments.

    Args:
      compute: function of pytrees; operations within it see one device's slices only.
      sharding: how volumes are split.
      takes: specs of the arguments, a tuple or a prefix of a tree.
      returns: specs of the result.
    """

    def alone(*args):
        with _SHARDING(None):
            return compute(*args)

    return jax.shard_map(
        alone, mesh=sharding.mesh, in_specs=takes, out_specs=returns, check_vma=False
    )


def elementwise(compute: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """Computes `compute(*operands)`, on each device for itself if depth is sharded.

    Args:
      compute: elementwise function of operands that are broadcast; returns a volume.
      *operands: volumes [N, D, *spatial, C], and values [N or 1, *ones, C] or [C].
    """
    sharding = active()
    if sharding is None:
        return compute(*operands)
    batch = max((x.shape[0] for x in operands if x.ndim > 2), default=1)
    takes = tuple(sharding.spec(x, batch) for x in operands)
    return by_shard(compute, sharding, takes, sharding.volume)(*operands)


def gathered(tokens: jax.Array) -> jax.Array:
    """Copies all tokens of a volume [N, tokens, ...] to each device that shares the volume."""
    sharding = active()
    if sharding is None:
        return tokens
    return lax.with_sharding_constraint(tokens, NamedSharding(sharding.mesh, sharding.sample))
