"""Up-sampling as one matrix product and one permutation, which suits CPUs and GPUs."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops.patches import depth_to_space, space_to_depth


def upsample(
    x: jax.Array, kernel: jax.Array, *, precision: lax.PrecisionLike, result: DTypeLike | None
) -> jax.Array:
    """Computes [N, *S, I], [*P, I, O] -> [N, *(S * P), O]."""
    *patch, inputs, features = kernel.shape
    columns = jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)  # [I, *P O]
    y = jnp.matmul(x, columns, precision=precision, preferred_element_type=result)
    return depth_to_space(y, patch, features)


def gradients(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, *, precision: lax.PrecisionLike
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of x and the kernel."""
    *patch, inputs, features = kernel.shape
    # Without the barrier the permutation would be computed in each of the two products.
    grad = lax.optimization_barrier(space_to_depth(grad, patch))  # [N, *S, *P O]
    columns = jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)  # [I, *P O]
    x_grad = jnp.matmul(grad, columns.T, precision=precision)
    columns_grad = jnp.matmul(
        x.reshape(-1, inputs).T, grad.reshape(-1, grad.shape[-1]), precision=precision
    )
    return x_grad, jnp.moveaxis(columns_grad.reshape(inputs, *patch, features), 0, -2)
