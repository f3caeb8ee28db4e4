"""The 3x3x3 convolution of stride 1, in the fastest form for each platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from unetr_flax.ops import sharding
from unetr_flax.ops.conv3x3x3 import cpu, sharded, tpu, xla
from unetr_flax.ops.conv3x3x3.operands import AnyOperands, backward_with_arrays
from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.features import without_moment_grads
from unetr_flax.ops.platform import by_platform

# Platforms that are not named use the default.
PLATFORMS = {"cpu": cpu, "tpu": tpu, "default": xla}

# Platforms whose modules accept operands with deferred norms.
NORMALIZING = {"tpu"}


# The gradients are written out so that each chooses its platform separately: differentiating
# through the choice would store the intermediate results of every platform.
@functools.partial(custom_vjp, nondiff_argnums=(1,))
def conv3x3x3(operands: AnyOperands, precision: lax.PrecisionLike) -> jax.Array:
    """Computes [N, D, H, W, I] -> [N, D, H, W, O] with SAME padding.

    Args:
      operands: input, kernel and bias.
      precision: precision of the products.
    """
    return _on_each("forward", precision=precision, differentiated=False)(operands)


def _forward(operands, precision):
    return _on_each("forward", precision=precision, differentiated=True)(operands), operands


def _backward(precision, operands, grad):
    grads = _on_each("backward", precision=precision)(operands, grad)
    return (without_moment_grads(grads),)


conv3x3x3.defvjp(_forward, _backward)


def _on_each(name: str, **options: Any) -> Callable:
    """Returns a function that calls the function `name` in the module of the running platform."""
    branches = {
        platform: functools.partial(getattr(module, name), **options)
        for platform, module in PLATFORMS.items()
    }
    for platform in PLATFORMS.keys() - NORMALIZING:
        branches[platform] = functools.partial(_WITH_ARRAYS[name], branches[platform])
    compute = functools.partial(by_platform, **branches)
    if (active := sharding.active()) is not None:
        return functools.partial(getattr(sharded, name), compute, active)
    return compute


def _forward_with_arrays(forward, operands):
    return forward(operands.with_arrays())


_WITH_ARRAYS = {"forward": _forward_with_arrays, "backward": backward_with_arrays}
