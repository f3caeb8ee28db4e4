"""The transformer encoder (Hatamizadeh et al. 2022, section 3.1, equations 1 to 4).

Shapes: B batch, N tokens, E hidden size, H heads, D head size.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unetr_flax import ops
from unetr_flax.blocks import at_least_float32, torch_uniform
from unetr_flax.config import UNETRConfig


class PatchEmbedding(nn.Module):
    """Image to tokens: a linear map of each patch plus a learned position (equation 1)."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, *img_size, C] -> [B, N, E], patches in row-major order."""
        cfg = self.config
        init = torch_uniform(math.prod(cfg.patch_size) * cfg.in_channels)
        x = nn.Conv(
            cfg.hidden_size,
            kernel_size=cfg.patch_size,
            strides=cfg.patch_size,
            padding="VALID",
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            conv_general_dilated=ops.conv_general_dilated,
            name="projection",
        )(image)  # [B, *grid_size, E]
        x = x.reshape(x.shape[0], cfg.num_patches, cfg.hidden_size)
        position = self.param(
            "position_embedding",
            nn.initializers.zeros,
            (1, cfg.num_patches, cfg.hidden_size),
            self.param_dtype,
        )
        x = x + position.astype(x.dtype)
        return nn.Dropout(cfg.dropout_rate)(x, deterministic=not train)


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention (equation 3; Vaswani et al. 2017, section 3.2)."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """[B, N, E] -> [B, N, E].

        Args:
          x: tokens.
          mask: boolean, broadcastable to [B, H, N queries, N keys]; True where a query may look.
          train: whether to drop attention weights.

        Raises:
          ValueError: if the mask is not boolean.
        """
        if mask is not None and mask.dtype != jnp.bool_:
            raise ValueError(f"mask: dtype {mask.dtype}, must be bool (True where attention goes)")
        cfg = self.config
        init = torch_uniform(cfg.hidden_size)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        qkv = nn.DenseGeneral(
            (3, cfg.num_heads, cfg.head_dim),
            kernel_init=init,
            bias_init=init,
            dot_general=ops.dot_general,
            **types,
            name="qkv",
        )(x)  # [B, N, 3, H, D]
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, N, H, D] each
        energy = jnp.einsum(
            "bqhd,bkhd->bhqk",
            query,
            key,
            preferred_element_type=at_least_float32(query.dtype),
        )
        if mask is not None:
            energy = jnp.where(mask, energy, jnp.finfo(energy.dtype).min)
        weights = nn.softmax(energy * cfg.attention_scale, axis=-1).astype(value.dtype)
        weights = nn.Dropout(cfg.dropout_rate)(weights, deterministic=not train)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(
            cfg.hidden_size,
            axis=(-2, -1),
            kernel_init=init,
            bias_init=init,
            dot_general=ops.dot_general,
            **types,
            name="projection",
        )(out)


class FeedForward(nn.Module):
    """Linear, exact GELU, dropout, linear."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, N, E] -> [B, N, E]."""
        cfg = self.config
        types = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "dot_general": ops.dot_general,
        }
        init = torch_uniform(cfg.hidden_size)
        x = nn.Dense(cfg.mlp_dim, kernel_init=init, bias_init=init, **types, name="expand")(x)
        x = nn.gelu(x, approximate=False)
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=not train)
        init = torch_uniform(cfg.mlp_dim)
        return nn.Dense(
            cfg.hidden_size, kernel_init=init, bias_init=init, **types, name="contract"
        )(x)


class TransformerBlock(nn.Module):
    """A pre-norm transformer block (equations 2 and 3)."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """[B, N, E] -> [B, N, E]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # PyTorch's epsilon, and variance without cancellation.
        norm = {"epsilon": 1e-5, "use_fast_variance": False, **types}
        attention = MultiHeadAttention(self.config, **types, name="attention")
        feed_forward = FeedForward(self.config, **types, name="feed_forward")
        x = x + attention(nn.LayerNorm(**norm, name="norm1")(x), mask, train=train)
        return x + feed_forward(nn.LayerNorm(**norm, name="norm2")(x), train=train)


class VisionTransformer(nn.Module):
    """Patch embedding and transformer blocks; no norm after the last (Dosovitskiy et al. 2021)."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, ...]:
        """[B, *img_size, C] -> the features [B, N, E] after each of `skip_layers`, in order."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = PatchEmbedding(self.config, **types, name="embedding")(image, train=train)
        skips = []
        for i in range(self.config.num_layers):
            x = TransformerBlock(self.config, **types, name=f"block_{i}")(x, mask, train=train)
            if i + 1 in self.config.skip_layers:
                skips.append(x)
        return tuple(skips)
