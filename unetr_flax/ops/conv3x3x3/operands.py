"""What a 3x3x3 convolution computes with."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unetr_flax.ops.features import DeferredNorm, DeferredUpsample, joined, normalized


class Operands(NamedTuple):
    """Operands of a 3x3x3 convolution.

    Attributes:
      x: [N, D, H, W, I], or None; deferred only where a platform normalizes it by itself.
      up: further channels, or None.
      kernel: [3, 3, 3, I (and those of up), O].
      bias: [O], or None.
    """

    x: jax.Array | DeferredNorm | None
    up: DeferredUpsample | None
    kernel: jax.Array
    bias: jax.Array | None

    def with_arrays(self) -> "Operands":
        """The same with norms computed."""
        return self if self.x is None else self._replace(x=normalized(self.x))

    def as_one(self) -> "Operands":
        """The same with all channels in one array."""
        if self.up is None:
            return self
        x = joined(self.up if self.x is None else (self.x, self.up))
        return self._replace(x=x, up=None)


def backward_as_one(
    backward: Callable[[Operands, jax.Array], Operands], operands: Operands, grad: jax.Array
) -> Operands:
    """The gradients of the operands, by a function that takes them with all channels in one."""
    one, vjp = jax.vjp(Operands.as_one, operands)
    return vjp(backward(one, grad))[0]


def backward_with_arrays(
    backward: Callable[[Operands, jax.Array], Operands], operands: Operands, grad: jax.Array
) -> Operands:
    """The gradients of the operands, by a function that takes them with norms computed."""
    if not isinstance(operands.x, DeferredNorm):
        return backward(operands, grad)
    with_arrays, vjp = jax.vjp(Operands.with_arrays, operands)
    return vjp(backward(with_arrays, grad))[0]


def mirrored(kernel: jax.Array) -> jax.Array:
    """The kernel that takes the gradient of a convolution's result to that of its input."""
    return jnp.flip(kernel, (0, 1, 2)).swapaxes(-1, -2)
