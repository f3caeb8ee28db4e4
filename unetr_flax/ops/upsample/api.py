"""Up-sampling by deconvolutions without overlap, in the fastest form for each platform."""

import functools

import jax
from jax import lax
from jax.typing import DTypeLike

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
    return _on_each("upsample", kernel, precision=precision, result=result)(x, kernel)


def _forward(x, kernel, precision, result):
    return upsample(x, kernel, precision, result), (x, kernel)


def _backward(precision, result, residuals, grad):
    x, kernel = residuals
    return _on_each("gradients", kernel, precision=precision)(x, kernel, grad.astype(x.dtype))


upsample.defvjp(_forward, _backward)


def _on_each(name, kernel, **options):
    """Returns a function that calls the function `name` in the module of the running platform."""
    branches = {
        platform: functools.partial(getattr(module, name), **options)
        for platform, module in PLATFORMS.items()
        if module is not tpu or tpu.pays(kernel)
    }
    return functools.partial(by_platform, **branches)
