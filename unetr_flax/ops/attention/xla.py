"""The plain definition of scaled dot-product attention (Vaswani et al. 2017, section 3.2.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from unetr_flax.ops.sharding import gathered


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float,
) -> jax.Array:
    """Computes softmax(query key^T scale) value; see `attention.api`."""
    return weighted_values(attention_weights(query, key, mask, scale=scale), value)


def attention_weights(
    query: jax.Array, key: jax.Array, mask: jax.Array | None = None, *, scale: float
) -> jax.Array:
    """Computes softmax(query key^T scale), with sums in float32 or wider; see `attention.api`.

    Returns:
      [B, H, N queries, N keys], in the query's dtype.
    """
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    key = gathered(key)
    energy = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
    if mask is not None:
        energy = jnp.where(mask, energy, jnp.finfo(energy.dtype).min)
    return nn.softmax(energy * scale, axis=-1).astype(query.dtype)


def weighted_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Computes [B, H, N queries, N keys], [B, N, H, D] -> [B, N, H, D]."""
    return jnp.einsum("bhqk,bkhd->bqhd", weights, gathered(value))
