"""Up-sampling by deconvolutions without overlap, in the fastest form for each platform."""

import functools

import jax
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops import sharding as sharded
from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.platform import by_platform
from unetr_flax.ops.upsample import product, tpu

# Platforms that are not named use the default.
PLATFORMS = {"tpu": tpu, "default": product}


@functools.partial(custom_vjp, nondiff_argnums=(2, 3))
def upsample(
    x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike, result: DTypeLike | None
) -> jax.Array:
    """Computes out[2i + a] = x[i] kernel[a] on each axis.

    Args:
      x: [N, *S, I].
      kernel: [*P, I, O], not mirrored.
      precision: precision of the products.
      result: dtype of the result; x's if None.

    Returns:
      [N, *(S * P), O].
    """
    compute = _on_each("upsample", kernel, precision=precision, result=result)
    if (sharding := sharded.active()) is not None:
        takes = sharding.volume, sharded.COPIED
        compute = sharded.by_shard(compute, sharding, takes, sharding.volume)
    return compute(x, kernel)


def _forward(x, kernel, precision, result):
    return upsample(x, kernel, precision, result), (x, kernel)


def _backward(precision, result, residuals, grad):
    x, kernel = residuals
    compute = _on_each("gradients", kernel, precision=precision)
    operands = x, kernel, grad.astype(x.dtype)
    if (sharding := sharded.active()) is None:
        return compute(*operands)

    def summed(*operands):
        x_grad, kernel_grad = compute(*operands)
        return x_grad, sharding.total_of_all(kernel_grad)

    takes = sharding.volume, sharded.COPIED, sharding.volume
    return sharded.by_shard(summed, sharding, takes, takes[:2])(*operands)


upsample.defvjp(_forward, _backward)


def _on_each(name, kernel, **options):
    """Returns a function that calls the function `name` in the module of the running platform."""
    branches = {
        platform: functools.partial(getattr(module, name), **options)
        for platform, module in PLATFORMS.items()
        if module is not tpu or tpu.pays(kernel)
    }
    return functools.partial(by_platform, **branches)
