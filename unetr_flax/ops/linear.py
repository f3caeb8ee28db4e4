"""Linear maps whose gradients XLA:CPU computes without repeating other work."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.platform import Lowering


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    lowering: Lowering = "auto",
) -> jax.Array:
    """Computes `jax.lax.dot_general`, whose gradient reads each cotangent once.

    Arguments, result and errors are those of `jax.lax.dot_general`. A linear map, which is a
    product of [*batch, *I] and [*I, *O], has a written-out gradient, unless the lowering is "xla".
    """
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    count = len(lhs_sum)
    is_linear = (
        lowering == "auto"
        and not lhs_batch
        and not rhs_batch
        and tuple(lhs_sum) == tuple(range(lhs.ndim - count, lhs.ndim))
        and tuple(rhs_sum) == tuple(range(count))
        and lhs.dtype == rhs.dtype
        and lhs.shape[-count:] == rhs.shape[:count]
        and preferred_element_type is None
    )
    if not is_linear:
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)
    inputs = math.prod(rhs.shape[:count])
    y = linear(lhs.reshape(-1, inputs), rhs.reshape(inputs, -1), precision)
    return y.reshape(*lhs.shape[:-count], *rhs.shape[count:])


@functools.partial(custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """Computes [N, I], [I, O] -> [N, O]."""
    return jnp.matmul(x, kernel, precision=precision)


def _linear_fwd(x, kernel, precision):
    return linear(x, kernel, precision), (x, kernel)


def _linear_bwd(precision, residuals, grad):
    x, kernel = residuals
    # JAX would multiply by the transposed gradient. For that copy XLA:CPU recomputes all that leads
    # to the gradient: in a residual stream, the sum over all later blocks.
    x_grad = jnp.matmul(grad, kernel.T, precision=precision)
    return x_grad, jnp.matmul(x.T, grad, precision=precision)


linear.defvjp(_linear_fwd, _linear_bwd)
