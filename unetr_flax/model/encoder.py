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
from unetr_flax.model.blocks import call, common_fields, torch_uniform
from unetr_flax.model.config import UNETRConfig


class PatchEmbedding(nn.Module):
    """The tokens of an image: a linear map of each patch plus a learned position (equation 1)."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes [B, *img_size, C] -> [B, N, E], patches in row-major order."""
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
            **common_fields(self),
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
        # The residual stream keeps the precision of the parameters, as in PyTorch's autocast.
        dtype = jnp.promote_types(x.dtype, position.dtype)
        x = ops.add(x.astype(dtype), position.astype(dtype), lowering=self.lowering)
        return nn.Dropout(cfg.dropout_rate)(x, deterministic=not train)


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention (equation 3; Vaswani et al. 2017, section 3.2)."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        train: bool = False,
        return_weights: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Computes [B, N, E] -> [B, N, E], and weights [B, H, N queries, N keys] if asked for.

        Args:
          x: tokens.
          mask: boolean, broadcastable to [B, H, N queries, N keys]; True where a query may look.
          train: whether to drop attention weights and, where the family does, outputs.
          return_weights: whether to return the attention weights, as they are before dropout.

        Raises:
          ValueError: if the mask is not boolean or not broadcastable.
        """
        cfg = self.config
        if mask is not None:
            batch, tokens, _ = x.shape
            _check_mask(mask, (batch, cfg.num_heads, tokens, tokens))
        init = torch_uniform(cfg.hidden_size)
        fields = common_fields(self)
        qkv = ops.Dense(
            (3, cfg.num_heads, cfg.head_dim),
            use_bias=cfg.qkv_bias,
            kernel_init=init,
            bias_init=init,
            **fields,
            name="qkv",
        )(x)  # [B, N, 3, H, D]
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, N, H, D] each
        scale = cfg.attention_scale
        if return_weights or (train and cfg.dropout_rate):
            weights = ops.attention_weights(query, key, mask, scale=scale)
            dropped = nn.Dropout(cfg.dropout_rate)(weights, deterministic=not train)
            out = ops.weighted_values(dropped, value)
        else:
            out = ops.dot_product_attention(
                query, key, value, mask, scale=scale, lowering=self.lowering
            )
        out = ops.Dense(
            cfg.hidden_size,
            axis=(-2, -1),
            kernel_init=init,
            bias_init=init,
            **fields,
            name="projection",
        )(out)
        if "attention" in cfg.family_spec.output_dropout:
            out = nn.Dropout(cfg.dropout_rate)(out, deterministic=not train)
        return (out, weights) if return_weights else out


def _check_mask(mask: jax.Array, weights: tuple[int, ...]) -> None:
    """Raises ValueError if a mask is not boolean or not broadcastable to the weights' shape."""
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask: dtype {mask.dtype}, must be bool (True where attention goes)")
    sizes = zip(reversed(mask.shape), reversed(weights), strict=False)
    if mask.ndim > len(weights) or any(own not in (1, size) for own, size in sizes):
        raise ValueError(f"mask: shape {mask.shape}, must be broadcastable to {weights}")


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes [B, N, E] -> [B, N, E]."""
        cfg = self.config
        fields = common_fields(self)
        init = torch_uniform(cfg.hidden_size)
        x = ops.Dense(cfg.mlp_dim, kernel_init=init, bias_init=init, **fields, name="expand")(x)
        if cfg.family_spec.activation == "relu":
            x = nn.relu(x)
        else:
            x = ops.gelu(x, lowering=self.lowering)
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=not train)
        init = torch_uniform(cfg.mlp_dim)
        x = ops.Dense(cfg.hidden_size, kernel_init=init, bias_init=init, **fields, name="contract")(
            x
        )
        if "feed_forward" in cfg.family_spec.output_dropout:
            x = nn.Dropout(cfg.dropout_rate)(x, deterministic=not train)
        return x


class TransformerBlock(nn.Module):
    """A pre-norm transformer block (equations 2 and 3)."""

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        branch_scale: jax.Array | None = None,
        train: bool = False,
        return_weights: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Computes [B, N, E] -> [B, N, E], and attention weights [B, H, N, N] if asked for.

        Args:
          x: tokens.
          mask: boolean, broadcastable to [B, H, N queries, N keys]; True where a query may look.
          branch_scale: factors of what attention and feed-forward layer add, [2, B]; 1 if None.
          train: whether dropout is active.
          return_weights: whether to return the attention weights.
        """
        cfg = self.config
        fields = common_fields(self)
        attention = MultiHeadAttention(cfg, **fields, name="attention")
        feed_forward = FeedForward(cfg, **fields, name="feed_forward")
        y = layer_norm(self, name="norm1")(x)
        attended: Any = attention(y, mask, train=train, return_weights=return_weights)
        y = attended[0] if return_weights else attended
        if branch_scale is not None:
            y = y * branch_scale[0, :, None, None].astype(y.dtype)
        x = ops.add(x, y.astype(x.dtype), lowering=self.lowering)
        y = feed_forward(layer_norm(self, name="norm2")(x), train=train)
        if branch_scale is not None:
            y = y * branch_scale[1, :, None, None].astype(y.dtype)
        x = ops.add(x, y.astype(x.dtype), lowering=self.lowering)
        return (x, attended[1]) if return_weights else x


def branch_scales(
    key: jax.Array, num_layers: int, batch_size: int, stochastic_depth: float
) -> jax.Array:
    """Draws the factors of residual branches for stochastic depth (Huang et al. 2016).

    The probability of dropping a branch grows linearly from 0 for the first block to
    `stochastic_depth` for the last (section 3); branches that stay are divided by the probability
    of staying, so that nothing changes at inference.

    Returns:
      0 or the inverse of the probability for each block, branch and sample, [num_layers, 2, B].
    """
    keep = 1 - jnp.linspace(0, stochastic_depth, num_layers)[:, None, None]
    stays = jax.random.bernoulli(key, keep, (num_layers, 2, batch_size))
    return jnp.where(stays, 1 / keep, 0)


def layer_norm(module: nn.Module, *, name: str) -> nn.LayerNorm:
    """Makes the transformer's norm: the family's epsilon, and variance without cancellation."""
    return nn.LayerNorm(
        epsilon=module.config.family_spec.layer_norm_epsilon,
        use_fast_variance=False,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        name=name,
    )


_TransformerBlockTracedOnce = nn.jit(TransformerBlock, static_argnames=("train", "return_weights"))


class VisionTransformer(nn.Module):
    """Patch embedding and transformer blocks (Dosovitskiy et al. 2021).

    Attributes:
      remat: whether the backward pass computes each block again.
      jit_blocks: whether equal blocks are traced only once, see `UNETR`.
      stochastic_depth: probability of skipping the last block, see `UNETR`.
    """

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    lowering: ops.Lowering = "auto"
    remat: bool = False
    jit_blocks: bool = False
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        mask: jax.Array | None = None,
        *,
        train: bool = False,
        return_attention: bool = False,
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Computes the features after `skip_layers` and the attention weights of every block.

        Args:
          image: [B, *img_size, C].
          mask: boolean, broadcastable to [B, H, N queries, N keys]; True where a query may look.
          train: whether dropout is active.
          return_attention: whether to return the attention weights.

        Returns:
          The features, [B, N, E] each, in order, the last one normalized where the family does;
          the weights, if asked for, [B, H, N, N] each.
        """
        cfg = self.config
        fields = common_fields(self)
        x = PatchEmbedding(cfg, **fields, name="embedding")(image, train=train)
        scales: Any = [None] * cfg.num_layers
        if train and self.stochastic_depth:
            key = self.make_rng("dropout")
            scales = branch_scales(key, cfg.num_layers, x.shape[0], self.stochastic_depth)
        features, attention = [], []
        block_class = _TransformerBlockTracedOnce if self.jit_blocks else TransformerBlock
        for i in range(cfg.num_layers):
            block = block_class(cfg, **fields, name=f"block_{i}")
            if return_attention:
                x, weights = block(
                    x, mask, branch_scale=scales[i], train=train, return_weights=True
                )
                attention.append(weights)
            else:
                arrays = {"mask": mask, "branch_scale": scales[i]}
                x = call(block, x, remat=self.remat, train=train, **arrays)
            if i + 1 in cfg.skip_layers:
                features.append(x)
        if cfg.family_spec.final_norm:
            features[-1] = layer_norm(self, name="norm")(features[-1])
        dtype = features[-1].dtype if self.dtype is None else self.dtype
        return tuple(x.astype(dtype) for x in features), tuple(attention)
