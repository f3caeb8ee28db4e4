"""Results that XLA:CPU computes once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.platform import by_platform


def materialize(compute: Callable[..., Any], witness: jax.Array, *operands: jax.Array) -> Any:
    """`compute(*operands)`, which XLA:CPU keeps in memory.

    Elsewhere XLA decides by itself. On CPU it fuses what is cheap by count into each of its uses,
    and so reads all that leads to it again and again, optimization barriers or not. It keeps the
    result of a conditional, which this becomes there.

    Args:
      compute: elementwise operations, sums and the like.
      witness: floating-point numbers that are the same on all devices and known at run time only.
        Results are NaN if the first of them is, and nothing is computed before it is known.
      *operands: arguments of `compute`.
    """

    def kept(witness, *operands):
        def fail(*operands):
            results = jax.eval_shape(compute, *operands)
            return jax.tree.map(lambda r: jnp.full(r.shape, jnp.nan, r.dtype), results)

        first = witness.reshape(-1)[0]
        return lax.cond(first == first, compute, fail, *operands)

    def free(witness, *operands):
        return compute(*operands)

    return by_platform(witness, *operands, cpu=kept, default=free)


def witness_of(grad: jax.Array) -> jax.Array:
    """A number [1] that is known when a gradient is; its batch may be shared by devices."""
    return grad[(slice(None), *(0,) * (grad.ndim - 1))].sum(keepdims=True)


@jax.custom_vjp
def gradient_once(x: jax.Array) -> jax.Array:
    """x, whose gradient XLA:CPU computes once, as it does what `materialize` computes."""
    return x


gradient_once.defvjp(
    lambda x: (x, None), lambda _, grad: (materialize(lambda grad: grad, witness_of(grad), grad),)
)
