"""Results that are materialized, as XLA:CPU would compute them again for each of their uses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.platform import Lowering, by_platform


def materialize(compute: Callable[..., Any], witness: jax.Array, *operands: jax.Array) -> Any:
    """Computes `compute(*operands)`, which XLA:CPU keeps in memory.

    On other platforms XLA decides by itself. On CPU it fuses what is cheap by count into each use,
    and so reads all that leads to it again and again, optimization barriers or not. It keeps the
    result of a conditional, which the computation becomes there.

    Args:
      compute: elementwise operations, sums and the like.
      witness: floating-point numbers that are the same on all devices and known at run time only.
        Results are NaN if the first of them is, and nothing is computed before it is known. Without
        any number there is nothing to compute.
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

    if 0 in witness.shape:
        return compute(*operands)
    return by_platform(witness, *operands, cpu=kept, default=free)


def witness_of(grad: jax.Array) -> jax.Array:
    """Computes a number [1] that is known when a gradient is; devices may share its batch."""
    return grad[(slice(None), *(0,) * (grad.ndim - 1))].sum(keepdims=True)


def add(x: jax.Array, y: jax.Array, *, lowering: Lowering = "auto") -> jax.Array:
    """Computes x + y, a sum in a residual stream.

    Its gradient is a sum over all later blocks, which XLA:CPU would compute anew in each of the
    blocks before; "auto" has it materialized.
    """
    return x + y if lowering == "xla" else _gradient_materialized(x + y)


@custom_vjp
def _gradient_materialized(x: jax.Array) -> jax.Array:
    return x


_gradient_materialized.defvjp(
    lambda x: (x, None),
    lambda _, grad: (materialize(lambda grad: grad, witness_of(grad), grad),),
)
