"""Materialized results, which XLA:CPU would otherwise compute again for each of their uses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.platform import Lowering, by_platform


def materialize(compute: Callable[..., Any], witness: jax.Array, *operands: jax.Array) -> Any:
    """Computes `compute(*operands)` and makes XLA:CPU store the result in memory.

    On other platforms XLA decides. On CPU it fuses operations that it counts as cheap into each of
    their uses, with or without optimization barriers, and so reads their inputs again and again.
    It does store the result of a conditional, so on CPU the computation becomes one.

    Args:
      compute: elementwise operations, sums and the like.
      witness: floating-point numbers that are the same on all devices and known only at run time.
        The results are NaN if the first of them is NaN, and nothing is computed before that number
        is known. An empty witness means that there is nothing to compute.
      *operands: arguments of `compute`.

    Returns:
      The result of `compute`, arrays or a tree of arrays.
    """

    def stored(witness, *operands):
        def fail(*operands):
            results = jax.eval_shape(compute, *operands)
            return jax.tree.map(lambda r: jnp.full(r.shape, jnp.nan, r.dtype), results)

        first = witness.reshape(-1)[0]
        return lax.cond(first == first, compute, fail, *operands)

    def free(witness, *operands):
        return compute(*operands)

    if 0 in witness.shape:
        return compute(*operands)
    return by_platform(witness, *operands, cpu=stored, default=free)


def witness_of(grad: jax.Array) -> jax.Array:
    """Sums one number of each sample to a witness [1] that is known only when a gradient is.

    The sum is the same on all devices, also if the batch is sharded.
    """
    return grad[(slice(None), *(0,) * (grad.ndim - 1))].sum(keepdims=True)


def add(x: jax.Array, y: jax.Array, *, lowering: Lowering = "auto") -> jax.Array:
    """Computes x + y, a sum in a residual stream.

    The gradient of this sum adds up all later blocks, which XLA:CPU would do again in each of the
    earlier blocks. With "auto" the gradient is materialized.
    """
    return x + y if lowering == "xla" else _gradient_materialized(x + y)


@custom_vjp
def _gradient_materialized(x: jax.Array) -> jax.Array:
    return x


_gradient_materialized.defvjp(
    lambda x: (x, None),
    lambda _, grad: (materialize(lambda grad: grad, witness_of(grad), grad),),
)
