"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1).

On NVIDIA's GPUs cuDNN computes it in one kernel that never writes the weights to memory (Dao et al.
2022, FlashAttention). Shapes: B batch, N tokens, H heads, D head size.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from unetr_flax.ops.platform import by_platform
from unetr_flax.runtime.cudnn import cuda_devices, cudnn_version

# cuDNN's kernels for any GPU: longer heads are for Hopper and later only.
MAX_HEAD_SIZE = 128


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float,
) -> jax.Array:
    """softmax(query key^T scale) value.

    By cuDNN where the process has CUDA devices that can, without a mask (cuDNN would add it as a
    bias, whose gradient is as large as the weights), in bfloat16 or float16; it has reverse-mode
    derivatives only there. `jax.export` refuses cuDNN's kernels, as it cannot promise to run them
    in later versions: export from a process without CUDA (JAX_PLATFORMS=cpu), for any platform.

    Args:
      query: [B, N, H, D].
      key: [B, N, H, D].
      value: [B, N, H, D].
      mask: boolean, broadcastable to [B, H, N queries, N keys]; True where a query may look.
      scale: of the products, before the softmax.

    Returns:
      [B, N, H, D].
    """
    if mask is None and _cudnn_can(query):
        return _fused(query, key, value, scale)
    return _by_products(query, key, value, mask, scale=scale)


def attention_weights(
    query: jax.Array, key: jax.Array, mask: jax.Array | None = None, *, scale: float
) -> jax.Array:
    """Weights [B, H, N queries, N keys] in the dtype of [B, N, H, D], sums at least float32."""
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    energy = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
    if mask is not None:
        energy = jnp.where(mask, energy, jnp.finfo(energy.dtype).min)
    return nn.softmax(energy * scale, axis=-1).astype(query.dtype)


def weighted_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """[B, H, N queries, N keys], [B, N, H, D] -> [B, N, H, D]."""
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _by_products(query, key, value, mask=None, *, scale):
    return weighted_values(attention_weights(query, key, mask, scale=scale), value)


def _by_cudnn(query, key, value, *, scale):
    return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn")


def _cudnn_can(query: jax.Array) -> bool:
    """Whether cuDNN has a kernel for it on all GPUs of this process, if there are any."""
    size = query.shape[-1]
    if query.dtype not in (jnp.bfloat16, jnp.float16) or size % 8 or size > MAX_HEAD_SIZE:
        return False
    # JAX wants to see a cuDNN even while it only traces, whatever platform it traces for. So
    # programs of processes without one do not have the choice at all.
    devices, version = cuda_devices(), cudnn_version()
    if not devices or version is None:
        return False
    capabilities = [tuple(map(int, d.compute_capability.split("."))) for d in devices]
    # From Ampere on, Blackwell's later chips from cuDNN 9.11 on.
    return min(capabilities) >= (8, 0) and (max(capabilities) <= (10, 0) or version >= (9, 11, 0))


# The gradient picks its platform by itself: differentiating through the choice would keep the
# weights that other platforms need. It computes them again, which costs cuDNN little.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    return by_platform(
        query,
        key,
        value,
        cuda=functools.partial(_by_cudnn, scale=scale),
        default=functools.partial(_by_products, scale=scale),
    )


def _fused_fwd(query, key, value, scale):
    return _fused(query, key, value, scale), (query, key, value)


def _fused_bwd(scale, residuals, grad):
    def gradients(attend, *arguments):
        *inputs, grad = arguments
        return jax.vjp(functools.partial(attend, scale=scale), *inputs)[1](grad)

    return by_platform(
        *residuals,
        grad,
        cuda=functools.partial(gradients, _by_cudnn),
        default=functools.partial(gradients, _by_products),
    )


_fused.defvjp(_fused_fwd, _fused_bwd)
