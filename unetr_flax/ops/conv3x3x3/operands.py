"""The operands of a 3x3x3 convolution."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from unetr_flax.ops.features import DeferredNorm, DeferredUpsample, concatenated, materialized

Input = TypeVar("Input", bound=jax.Array | DeferredNorm | None, covariant=True)


class Operands(NamedTuple, Generic[Input]):
    """Operands of a 3x3x3 convolution.

    Attributes:
      x: [N, D, H, W, I], or None; deferred only for platforms that normalize it themselves.
      up: further channels, up-sampled, or None, but not both None.
      kernel: [3, 3, 3, I (and the channels of up), O].
      bias: [O], or None.
    """

    x: Input
    up: DeferredUpsample[jax.Array] | None
    kernel: jax.Array
    bias: jax.Array | None

    @property
    def grid(self) -> tuple[int, ...]:
        """Batch and spatial sizes, (N, D, H, W)."""
        return next(part.shape[:-1] for part in (self.x, self.up) if part is not None)

    def with_arrays(self) -> "ArrayOperands":
        """Computes a deferred norm."""
        x = self.x if self.x is None else materialized(self.x)
        return Operands(x, self.up, self.kernel, self.bias)

    def as_one(self) -> "Operands[jax.Array]":
        """Concatenates all channels into one array."""
        found = tuple(part for part in (self.x, self.up) if part is not None)
        return Operands(concatenated(found), None, self.kernel, self.bias)


AnyOperands = Operands[jax.Array | DeferredNorm | None]
ArrayOperands = Operands[jax.Array | None]


def backward_as_one(
    backward: Callable[[Operands[jax.Array], jax.Array], ArrayOperands],
    operands: ArrayOperands,
    grad: jax.Array,
) -> ArrayOperands:
    """Computes the operands' gradients with a function that takes all channels in one array."""
    one, vjp = jax.vjp(Operands.as_one, operands)
    return vjp(backward(one, grad))[0]


def backward_with_arrays(
    backward: Callable[[ArrayOperands, jax.Array], ArrayOperands],
    operands: AnyOperands,
    grad: jax.Array,
) -> AnyOperands:
    """Computes the operands' gradients with a function that takes norms as arrays."""
    if not isinstance(operands.x, DeferredNorm):
        return backward(operands.with_arrays(), grad)
    with_arrays, vjp = jax.vjp(Operands.with_arrays, operands)
    return vjp(backward(with_arrays, grad))[0]


def mirrored(kernel: jax.Array) -> jax.Array:
    """Returns the kernel that maps the gradient of a convolution's result to that of its input."""
    return jnp.flip(kernel, (0, 1, 2)).swapaxes(-1, -2)
