"""The transformer encoder (Hatamizadeh et al. 2022, section 3.1, equations 1 to 4).

Shapes: B batch, N tokens, E hidden size, H heads, D head size.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unetr_flax import ops
from unetr_flax.model.blocks import call, torch_uniform
from unetr_flax.model.config import UNETRConfig


class PatchEmbedding(nn.Module):
    """Image to tokens: a linear map of each patch plus a learned position (equation 1)."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, *img_size, C] -> [B, N, E], patches in row-major order."""
        cfg = self.config
        kernel_init = bias_init = torch_uniform(math.prod(cfg.patch_size) * cfg.in_channels)
        if cfg.proj_type == "perceptron":
            kernel_init, bias_init = nn.initializers.normal(0.02), nn.initializers.zeros
        x = ops.Conv(
            cfg.hidden_size,
            kernel_size=cfg.patch_size,
            strides=cfg.patch_size,
            padding="VALID",
            kernel_init=kernel_init,
            bias_init=bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="projection",
        )(image)  # [B, *grid_size, E]
        x = x.reshape(x.shape[0], cfg.num_patches, cfg.hidden_size)
        position = self.param(
            "position_embedding",
            nn.initializers.normal(cfg.family_spec.position_std)
            if cfg.family_spec.position_std
            else nn.initializers.zeros,
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
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        train: bool = False,
        return_weights: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """[B, N, E] -> [B, N, E], and attention weights [B, H, N queries, N keys] if asked for.

        Args:
          x: tokens.
          mask: boolean, broadcastable to [B, H, N queries, N keys]; True where a query may look.
          train: whether to drop attention weights and, where the family does, outputs.
          return_weights: whether to return the attention weights, as they are before dropout.

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
            use_bias=cfg.qkv_bias,
            kernel_init=init,
            bias_init=init,
            dot_general=ops.dot_general,
            **types,
            name="qkv",
        )(x)  # [B, N, 3, H, D]
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, N, H, D] each
        scale = cfg.attention_scale
        if return_weights or (train and cfg.dropout_rate):
            weights = ops.attention_weights(query, key, mask, scale=scale)
            dropped = nn.Dropout(cfg.dropout_rate)(weights, deterministic=not train)
            out = ops.weighted_values(dropped, value)
        else:
            out = ops.dot_product_attention(query, key, value, mask, scale=scale)
        out = nn.DenseGeneral(
            cfg.hidden_size,
            axis=(-2, -1),
            kernel_init=init,
            bias_init=init,
            dot_general=ops.dot_general,
            **types,
            name="projection",
        )(out)
        if "attention" in cfg.family_spec.output_dropout:
            out = nn.Dropout(cfg.dropout_rate)(out, deterministic=not train)
        return (out, weights) if return_weights else out


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear."""

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
        x = nn.relu(x) if cfg.family_spec.activation == "relu" else nn.gelu(x, approximate=False)
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=not train)
        init = torch_uniform(cfg.mlp_dim)
        x = nn.Dense(cfg.hidden_size, kernel_init=init, bias_init=init, **types, name="contract")(x)
        if "feed_forward" in cfg.family_spec.output_dropout:
            x = nn.Dropout(cfg.dropout_rate)(x, deterministic=not train)
        return x


class TransformerBlock(nn.Module):
    """A pre-norm transformer block (equations 2 and 3)."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        train: bool = False,
        return_weights: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """[B, N, E] -> [B, N, E], and attention weights [B, H, N, N] if asked for."""
        cfg = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = MultiHeadAttention(cfg, **types, name="attention")
        feed_forward = FeedForward(cfg, **types, name="feed_forward")
        # Else the gradient of a sum is computed anew in each of the blocks below.
        x = ops.gradient_once(x)
        y = layer_norm(cfg, **types, name="norm1")(x)
        if return_weights:
            y, weights = attention(y, mask, train=train, return_weights=True)
        else:
            y = attention(y, mask, train=train)
        x = ops.gradient_once(x + y)
        x = x + feed_forward(layer_norm(cfg, **types, name="norm2")(x), train=train)
        return (x, weights) if return_weights else x


def layer_norm(cfg: UNETRConfig, **fields: Any) -> nn.LayerNorm:
    """The transformer's norm: PyTorch's epsilon, and variance without cancellation."""
    return nn.LayerNorm(
        epsilon=cfg.family_spec.layer_norm_epsilon, use_fast_variance=False, **fields
    )


# Equal ones are traced once, so that `nn.tabulate` and the like see into the first only.
_SharedTransformerBlock = nn.jit(TransformerBlock, static_argnames=("train", "return_weights"))


class VisionTransformer(nn.Module):
    """Patch embedding and transformer blocks (Dosovitskiy et al. 2021)."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        mask: jax.Array | None = None,
        *,
        train: bool = False,
        return_attention: bool = False,
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """[B, *img_size, C] -> features after `skip_layers`, attention weights of every block.

        The features are [B, N, E] each, in order, the last one normalized where the family does;
        the weights, if asked for, [B, H, N, N] each.
        """
        cfg = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = PatchEmbedding(cfg, **types, name="embedding")(image, train=train)
        features, attention = [], []
        block_class = _SharedTransformerBlock if ops.in_program() else TransformerBlock
        for i in range(cfg.num_layers):
            block = block_class(cfg, **types, name=f"block_{i}")
            if return_attention:
                x, weights = block(x, mask, train=train, return_weights=True)
                attention.append(weights)
            else:
                x = call(block, x, remat=self.remat, mask=mask, train=train)
            if i + 1 in cfg.skip_layers:
                features.append(x)
        if cfg.family_spec.final_norm:
            features[-1] = layer_norm(cfg, **types, name="norm")(features[-1])
        return tuple(features), tuple(attention)
