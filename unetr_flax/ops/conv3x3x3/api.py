"""The 3x3x3 convolution of stride 1, as each platform does it best."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from unetr_flax.ops.conv3x3x3 import cpu as conv3x3x3_cpu
from unetr_flax.ops.conv3x3x3 import gpu as conv3x3x3_gpu
from unetr_flax.ops.conv3x3x3 import tpu as conv3x3x3_tpu
from unetr_flax.ops.conv3x3x3.operands import Operands, backward_with_arrays
from unetr_flax.ops.platform import by_platform

PLATFORMS = {"cpu": conv3x3x3_cpu, "tpu": conv3x3x3_tpu, "default": conv3x3x3_gpu}

# Those whose modules take operands with deferred norms.
NORMALISING = {"tpu"}


# The gradients are written out so that each picks its platform by itself: differentiating through
# the choice would keep the intermediate results of every platform.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def conv3x3x3(operands: Operands, precision: lax.PrecisionLike, keep: bool) -> jax.Array:
    """Stride 1, SAME padding: -> [N, D, H, W, O]. It has reverse-mode derivatives only.

    Args:
      operands: what to compute with.
      precision: of the products.
      keep: whether the result has several uses; XLA:CPU must be told.
    """
    return _on_each("forward", precision=precision, keep=keep)(operands)


def _forward(operands, precision, keep):
    # In a backward pass it has.
    return _on_each("forward", precision=precision, keep=True)(operands), operands


def _backward(precision, keep, operands, grad):
    return (_on_each("backward", precision=precision)(operands, grad),)


conv3x3x3.defvjp(_forward, _backward)


def _on_each(name: str, **options: Any) -> Callable:
    """A function of the platforms' modules, whose platform is that which the program runs on."""
    branches = {
        platform: functools.partial(getattr(module, name), **options)
        for platform, module in PLATFORMS.items()
    }
    for platform in PLATFORMS.keys() - NORMALISING:
        branches[platform] = functools.partial(_WITH_ARRAYS[name], branches[platform])
    return functools.partial(by_platform, **branches)


def _forward_with_arrays(forward, operands):
    return forward(operands.with_arrays())


_WITH_ARRAYS = {"forward": _forward_with_arrays, "backward": backward_with_arrays}
