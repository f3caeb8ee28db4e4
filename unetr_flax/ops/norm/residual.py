"""The end of a residual block: the sum of its two branches, and a LeakyReLU."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.features import DeferredNorm, norm_of, without_moment_grads
from unetr_flax.ops.materialize import materialize, witness_of
from unetr_flax.ops.norm.tuned import affine
from unetr_flax.ops.norm.xla import leaky_relu
from unetr_flax.ops.platform import Lowering

Parts = tuple[jax.Array | DeferredNorm, ...]


def add_leaky_relu(
    x: jax.Array, y: jax.Array, negative_slope: float, *, lowering: Lowering = "auto"
) -> jax.Array:
    """Computes LeakyReLU(x + y); norms that made x or y become part of the same pass over memory.

    Args:
      x: [N, *spatial, C].
      y: the same shape; if a norm made x, it may be wider than the result, which has x's dtype.
      negative_slope: factor on negative sums; not negative.
      lowering: "auto" or "xla", see `platform.Lowering`.
    """
    parts = tuple(norm_of(part) or part for part in (x, y))
    if lowering == "auto" and any(isinstance(part, DeferredNorm) for part in parts):
        return _add(parts, negative_slope)
    return leaky_relu(x + y, negative_slope)


@functools.partial(custom_vjp, nondiff_argnums=(1,))
def _add(parts, negative_slope):
    dtype = parts[0].dtype
    operands = [_operands(part) for part in parts]
    leaves, structure = jax.tree.flatten(operands)

    def add_up(*leaves):
        first, second = jax.tree.unflatten(structure, leaves)
        total = _value(parts[0], *first) + _value(parts[1], *second)
        return leaky_relu(total, negative_slope).astype(dtype)

    return materialize(add_up, _witness(parts), *leaves)


def _witness(parts: Parts) -> jax.Array:
    return next(part.moments[0] for part in parts if isinstance(part, DeferredNorm))


def _operands(part):
    if not isinstance(part, DeferredNorm):
        return (part,)
    mean, var = part.moments
    return part.x, mean, lax.rsqrt(var + part.epsilon) * part.scale, part.bias


def _value(part, x, *norm):
    if isinstance(part, DeferredNorm):
        mean, factor, bias = norm
        return affine(x, mean, factor, bias, part.negative_slope)
    return x.astype(at_least_float32(part.dtype))


def _forward(parts, negative_slope):
    total = _add(parts, negative_slope)
    return total, (parts, total)


def _backward(negative_slope, residuals, grad):
    parts, total = residuals

    def before(total, grad):
        """Returns the gradient before LeakyReLU."""
        return jnp.where(total > 0, grad, negative_slope * grad)

    grad = materialize(before, witness_of(grad), total, grad)
    return (without_moment_grads(tuple(_grad(part, grad) for part in parts)),)


def _grad(part, grad):
    # A shortcut may be wider than the sum, as the image is beside features of half precision.
    grad = grad.astype(part.dtype)
    return jax.vjp(DeferredNorm.array, part)[1](grad)[0] if isinstance(part, DeferredNorm) else grad


_add.defvjp(_forward, _backward)
