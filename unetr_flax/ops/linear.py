"""Linear maps: one rounding in 16 bits on CPU, and gradients that repeat no other work there."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops import sharding as sharded
from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.platform import by_platform


@functools.partial(custom_vjp, nondiff_argnums=(3, 4))
def linear(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    precision: lax.PrecisionLike,
    result: DTypeLike,
) -> jax.Array:
    """Computes x kernel + bias, [*batch, I], [I, O], [O] -> [*batch, O].

    Args:
      x: [*batch, I].
      kernel: [I, O], of x's dtype.
      bias: [O], of x's dtype, or None.
      precision: precision of the products.
      result: dtype of the result. On CPU the exact sum is rounded to it once. Other platforms
        compute in x's dtype, since they add a bias before they round, or within another pass.
    """
    sharding = sharded.active()
    compute = functools.partial(_forward, precision=precision, result=result)
    if sharding is not None and x.ndim > 2:
        takes = sharding.volume, sharded.COPIED, sharded.COPIED
        compute = sharded.by_shard(compute, sharding, takes, sharding.volume)
    return compute(x, kernel, bias)


def _forward(x, kernel, bias, *, precision, result):
    wide = at_least_float32(x.dtype)
    if x.dtype == wide:
        return _plus(_product(x, kernel, precision), bias).astype(result)

    def rounded_once(x, kernel, *bias):
        y = _product(x, kernel, precision, wide)
        return _plus(y, *(b.astype(wide) for b in bias)).astype(result)

    def in_dtype(x, kernel, *bias):
        return _plus(_product(x, kernel, precision), *bias).astype(result)

    operands = (x, kernel) if bias is None else (x, kernel, bias)
    return by_platform(*operands, cpu=rounded_once, default=in_dtype)


def _plus(y, bias=None):
    return y if bias is None else y + bias


def _product(x, kernel, precision, result=None):
    # XLA's products of two matrices are faster than those of more axes.
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(rows, kernel, precision=precision, preferred_element_type=result)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _linear_fwd(x, kernel, bias, precision, result):
    return linear(x, kernel, bias, precision, result), (x, kernel, bias)


def _linear_bwd(precision, result, residuals, grad):
    x, kernel, bias = residuals
    sharding = sharded.active()
    gradients = functools.partial(_gradients, has_bias=bias is not None, precision=precision)
    if sharding is None or x.ndim < 3:
        return gradients(x, kernel, grad)

    def summed(*operands):
        x_grad, *of_parameters = gradients(*operands)
        return x_grad, *sharding.total_of_all(of_parameters)

    takes = sharding.volume, sharded.COPIED, sharding.volume
    returns = sharding.volume, sharded.COPIED, sharded.COPIED
    return sharded.by_shard(summed, sharding, takes, returns)(x, kernel, grad)


def _gradients(x, kernel, grad, *, has_bias, precision):
    wide = at_least_float32(x.dtype)
    bias_grad = grad.astype(wide).sum(range(grad.ndim - 1)).astype(x.dtype) if has_bias else None
    grad = grad.astype(x.dtype)
    # JAX would multiply by the transposed gradient. For that copy XLA:CPU recomputes all that leads
    # to the gradient: in a residual stream, the sum over all later blocks.
    x_grad = _product(grad, kernel.T, precision)
    rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return x_grad, jnp.matmul(rows[0].T, rows[1], precision=precision), bias_grad


linear.defvjp(_linear_fwd, _linear_bwd)
