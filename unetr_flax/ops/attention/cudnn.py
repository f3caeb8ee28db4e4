"""Scaled dot-product attention by cuDNN, on NVIDIA's GPUs.

cuDNN computes it in one kernel that never writes the weights to memory (Dao et al. 2022,
FlashAttention).
"""

import functools

import jax
import jax.numpy as jnp

from unetr_flax.ops.attention import xla
from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.platform import by_platform, must_be_exportable
from unetr_flax.runtime.cudnn import cuda_devices, cudnn_version

# Longer heads have cuDNN kernels on Hopper and later GPUs only.
MAX_HEAD_SIZE = 128


def is_available(query: jax.Array) -> bool:
    """Tells whether cuDNN has a kernel for [B, N, H, D] on all GPUs of this process, if any.

    It has none for programs of `ops.exportable`.
    """
    if must_be_exportable():
        return False
    size = query.shape[-1]
    if query.dtype not in (jnp.bfloat16, jnp.float16) or size % 8 or size > MAX_HEAD_SIZE:
        return False
    # JAX looks for cuDNN while tracing, whatever the platform. So programs that are traced without
    # cuDNN cannot contain this branch.
    devices, version = cuda_devices(), cudnn_version()
    if not devices or version is None:
        return False
    capabilities = [tuple(map(int, d.compute_capability.split("."))) for d in devices]
    # cuDNN supports Ampere and later chips, those after the first Blackwell from 9.11 on.
    return min(capabilities) >= (8, 0) and (max(capabilities) <= (10, 0) or version >= (9, 11, 0))


# The gradient chooses its platform separately: differentiating through the choice would store the
# weights, which only other platforms need. Recomputing the weights costs cuDNN little.
@functools.partial(custom_vjp, nondiff_argnums=(3,))
def dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float
) -> jax.Array:
    """Computes softmax(query key^T scale) value, on other platforms as `attention.xla`."""
    return by_platform(
        query,
        key,
        value,
        cuda=functools.partial(_by_cudnn, scale=scale),
        default=functools.partial(xla.dot_product_attention, scale=scale),
    )


def _by_cudnn(query, key, value, *, scale):
    return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn")


def _forward(query, key, value, scale):
    return dot_product_attention(query, key, value, scale), (query, key, value)


def _backward(scale, residuals, grad):
    def gradients(attend, *arguments):
        *inputs, grad = arguments
        return jax.vjp(functools.partial(attend, scale=scale), *inputs)[1](grad)

    return by_platform(
        *residuals,
        grad,
        cuda=functools.partial(gradients, _by_cudnn),
        default=functools.partial(gradients, xla.dot_product_attention),
    )


dot_product_attention.defvjp(_forward, _backward)
