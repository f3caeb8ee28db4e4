"""The operands of a 3x3x3 convolution."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unetr_flax.ops.features import DeferredNorm, DeferredUpsample, concatenated, materialized


class Operands(NamedTuple):
    """Operands of a 3x3x3 convolution.

    Attributes:
      x: [N, D, H, W, I], or None; deferred only where a platform normalizes it by itself.
      up: further channels, up-sampled, or None.
      kernel: [3, 3, 3, I (and the channels of up), O].
      bias: [O], or None.
    """

    x: jax.Array | DeferredNorm | None
    up: DeferredUpsample | None
    kernel: jax.Array
    bias: jax.Array | None

    def with_arrays(self) -> "Operands":
        """Computes a deferred norm."""
        return self if self.x is None else self._replace(x=materialized(self.x))

    def as_one(self) -> "Operands":
        """Concatenates all channels into one array."""
        if self.up is None:
            return self
        x = concatenated(self.up if self.x is None else (self.x, self.up))
        return self._replace(x=x, up=None)


def backward_as_one(
    backward: Callable[[Operands, jax.Array], Operands], operands: Operands, grad: jax.Array
) -> Operands:
    """Computes the operands' gradients by a function that takes all channels in one array."""
    one, vjp = jax.vjp(Operands.as_one, operands)
    return vjp(backward(one, grad))[0]


def backward_with_arrays(
    backward: Callable[[Operands, jax.Array], Operands], operands: Operands, grad: jax.Array
) -> Operands:
    """Computes the operands' gradients by a function that takes norms as arrays."""
    if not isinstance(operands.x, DeferredNorm):
        return backward(operands, grad)
    with_arrays, vjp = jax.vjp(Operands.with_arrays, operands)
    return vjp(backward(with_arrays, grad))[0]


def mirrored(kernel: jax.Array) -> jax.Array:
    """Returns the kernel that takes the gradient of a convolution's result to that of its input."""
    return jnp.flip(kernel, (0, 1, 2)).swapaxes(-1, -2)
