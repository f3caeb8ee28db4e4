"""The end of a residual block: the sum of what meets there, and its LeakyReLU."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.features import DeferredNorm
from unetr_flax.ops.materialize import materialize, witness_of
from unetr_flax.ops.norm.api import affine

# What can meet: norms need not be arrays.
Parts = tuple[jax.Array | DeferredNorm, ...]


def residual(parts: Parts, negative_slope: float) -> jax.Array:
    """LeakyReLU of the sum of parts [N, *spatial, C], norms included, in one pass over memory.

    Args:
      parts: what is added; of one dtype.
      negative_slope: what negative sums are multiplied by; not negative.
    """
    if any(isinstance(part, DeferredNorm) for part in parts):
        return _residual(parts, negative_slope)
    return nn.leaky_relu(sum(parts), negative_slope)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _residual(parts, negative_slope):
    dtype = parts[0].dtype
    operands = [_operands(part) for part in parts]
    leaves, structure = jax.tree.flatten(operands)

    def add_up(*leaves):
        values = zip(parts, jax.tree.unflatten(structure, leaves), strict=True)
        total = sum(_value(part, *operands) for part, operands in values)
        return nn.leaky_relu(total, negative_slope).astype(dtype)

    return materialize(add_up, _witness(parts), *leaves)


def _witness(parts):
    return next(part.moments[0] for part in parts if isinstance(part, DeferredNorm))


def _operands(part):
    if not isinstance(part, DeferredNorm):
        return (part,)
    mean, var = part.moments
    return part.x, mean, lax.rsqrt(var + part.epsilon) * part.scale, part.bias


def _value(part, *operands):
    if isinstance(part, DeferredNorm):
        return affine(*operands, part.negative_slope)
    return operands[0].astype(at_least_float32(part.dtype))


def _forward(parts, negative_slope):
    total = _residual(parts, negative_slope)
    return total, (parts, total)


def _backward(negative_slope, residuals, grad):
    parts, total = residuals

    def before(total, grad):
        """The gradient before LeakyReLU."""
        return jnp.where(total > 0, grad, negative_slope * grad)

    grad = materialize(before, witness_of(grad), total, grad)
    return (tuple(_grad(part, grad) for part in parts),)


def _grad(part, grad):
    return jax.vjp(DeferredNorm.array, part)[1](grad)[0] if isinstance(part, DeferredNorm) else grad


_residual.defvjp(_forward, _backward)
