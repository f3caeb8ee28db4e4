"""The 3x3x3 convolution of volumes that are split over devices.

Each device convolves its samples in the form of its platform. Where depth is split, these are its
slices and one slice of each neighbor, and the results at both ends are dropped.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unetr_flax.ops.conv3x3x3.operands import (
    AnyOperands,
    ArrayOperands,
    Operands,
    backward_as_one,
    backward_with_arrays,
)
from unetr_flax.ops.sharding import COPIED, VolumeSharding, by_shard


def forward(
    compute: Callable[[AnyOperands], jax.Array], sharding: VolumeSharding, operands: AnyOperands
) -> jax.Array:
    """Computes [N, D, H, W, O].

    Args:
      compute: the convolution on one device.
      sharding: how the volumes are split.
      operands: operands of the whole convolution.
    """
    given = operands.with_arrays()
    if sharding.count > 1:
        given = given.as_one()

    def on_shard(given):
        if sharding.count == 1:
            return compute(given)
        return compute(given._replace(x=sharding.with_neighbors(given.x)))[:, 1:-1]

    return by_shard(on_shard, sharding, (_specs(sharding, given),), sharding.volume)(given)


def backward(
    compute: Callable[[AnyOperands, jax.Array], AnyOperands],
    sharding: VolumeSharding,
    operands: AnyOperands,
    grad: jax.Array,
) -> AnyOperands:
    """Computes the gradients of the operands, as `forward` the result."""

    def on_shard(given, grad):
        if sharding.count > 1:
            given = given._replace(x=sharding.with_neighbors(given.x))
            # The results of the neighbors' slices were dropped, so their gradients are zero.
            grad = jnp.pad(grad, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        found: Any = compute(given, grad)
        x, up, kernel, bias = found
        kernel, bias = sharding.total_of_all((kernel, bias))
        if up is not None:
            up_kernel, up_bias = sharding.total_of_all((up.kernel, up.bias))
            up = up.replace(kernel=up_kernel, bias=up_bias)
        return Operands(None if x is None else sharding.add_to_neighbors(x), up, kernel, bias)

    def gradients(given, grad):
        specs = _specs(sharding, given)
        return by_shard(on_shard, sharding, (specs, sharding.volume), specs)(given, grad)

    as_one = functools.partial(backward_as_one, gradients)
    return backward_with_arrays(as_one if sharding.count > 1 else gradients, operands, grad)


def _specs(sharding: VolumeSharding, operands: ArrayOperands) -> Any:
    """Returns a tree like the operands with the spec of each array."""

    def spec(path, _):
        # Volumes are the fields named x, also that of the up-sampling.
        return sharding.volume if path[-1].name == "x" else COPIED

    return jax.tree_util.tree_map_with_path(spec, operands)
