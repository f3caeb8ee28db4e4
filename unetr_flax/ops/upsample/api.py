"""Up-sampling by deconvolutions whose windows do not overlap."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops.patches import depth_to_space, space_to_depth
from unetr_flax.ops.platform import by_platform
from unetr_flax.ops.upsample import tpu as upsample_tpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def upsample(
    x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike, result: DTypeLike | None
) -> jax.Array:
    """out[2i + a] = x[i] kernel[a] on each axis: [N, *S, I], [*P, I, O] -> [N, *(S * P), O]."""
    return _on_each(0, kernel, precision=precision, result=result)(x, kernel)


def _upsample_fwd(x, kernel, precision, result):
    return upsample(x, kernel, precision, result), (x, kernel)


def _upsample_bwd(precision, result, residuals, grad):
    x, kernel = residuals
    return _on_each(1, kernel, precision=precision)(x, kernel, grad.astype(x.dtype))


upsample.defvjp(_upsample_fwd, _upsample_bwd)


def _by_product(x, kernel, *, precision, result):
    """One matrix product, then one permutation."""
    *patch, inputs, features = kernel.shape
    columns = jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)  # [I, *P O]
    y = jnp.matmul(x, columns, precision=precision, preferred_element_type=result)
    return depth_to_space(y, patch, features)


def _gradients_of_product(x, kernel, grad, *, precision):
    *patch, inputs, features = kernel.shape
    # Without the barrier the permutation would be computed in each of the two products.
    grad = lax.optimization_barrier(space_to_depth(grad, patch))  # [N, *S, *P O]
    columns = jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)  # [I, *P O]
    x_grad = jnp.matmul(grad, columns.T, precision=precision)
    columns_grad = jnp.matmul(
        x.reshape(-1, inputs).T, grad.reshape(-1, grad.shape[-1]), precision=precision
    )
    return x_grad, jnp.moveaxis(columns_grad.reshape(inputs, *patch, features), 0, -2)


# How each platform computes it and its gradients.
FORMS = {
    "tpu": (upsample_tpu.upsample, upsample_tpu.gradients),
    "default": (_by_product, _gradients_of_product),
}


def _on_each(which, kernel, **options):
    """A function of `FORMS`, whose platform is that which the program runs on."""
    pays = upsample_tpu.pays(kernel)
    branches = {
        platform: functools.partial(functions[which], **options)
        for platform, functions in FORMS.items()
        if platform == "default" or pays
    }
    return functools.partial(by_platform, **branches)
