"""Linear maps whose gradients XLA:CPU computes without repeating other work."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops import sharding as sharded
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
    x = lhs.reshape(*lhs.shape[:-count], inputs)
    y = linear(x, rhs.reshape(inputs, -1), precision)
    return y.reshape(*lhs.shape[:-count], *rhs.shape[count:])


@functools.partial(custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """Computes [*batch, I], [I, O] -> [*batch, O]."""
    sharding = sharded.active()
    product = functools.partial(_product, precision=precision)
    if sharding is not None and x.ndim > 2:
        takes = sharding.volume, sharded.COPIED
        product = sharded.by_shard(product, sharding, takes, sharding.volume)
    return product(x, kernel)


def _product(x, kernel, precision):
    # XLA's products of two matrices are faster than those of more axes.
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=precision)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _linear_fwd(x, kernel, precision):
    return linear(x, kernel, precision), (x, kernel)


def _linear_bwd(precision, residuals, grad):
    x, kernel = residuals
    sharding = sharded.active()
    gradients = functools.partial(_gradients, precision=precision)
    if sharding is None or x.ndim < 3:
        return gradients(x, kernel, grad)

    def summed(*operands):
        x_grad, kernel_grad = gradients(*operands)
        return x_grad, sharding.total_of_all(kernel_grad)

    takes = sharding.volume, sharded.COPIED, sharding.volume
    return sharded.by_shard(summed, sharding, takes, takes[:2])(x, kernel, grad)


def _gradients(x, kernel, grad, precision):
    # JAX would multiply by the transposed gradient. For that copy XLA:CPU recomputes all that leads
    # to the gradient: in a residual stream, the sum over all later blocks.
    x_grad = _product(grad, kernel.T, precision)
    rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return x_grad, jnp.matmul(rows[0].T, rows[1], precision=precision)


linear.defvjp(_linear_fwd, _linear_bwd)
