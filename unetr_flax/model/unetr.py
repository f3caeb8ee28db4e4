"""UNETR: a transformer encodes the volume as patches, a U-Net decoder computes the logits."""

from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unetr_flax import ops
from unetr_flax.model.blocks import common_fields
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.decoder import Decoder
from unetr_flax.model.encoder import VisionTransformer


class UNETR(nn.Module):
    """UNETR (Hatamizadeh et al. 2022, "UNETR: Transformers for 3D Medical Image Segmentation").

    Attributes:
      config: sizes and options.
      dtype: dtype of the computation; that of input and parameters if None. With jnp.bfloat16,
        statistics and softmax stay in the parameters' precision.
      param_dtype: dtype of the parameters and running statistics.
      remat: whether training stores only the inputs of transformer and residual blocks and the
        results of other convolutions; the backward pass computes the rest again (Chen et al.
        2016). That takes more time and a fraction of the memory; the numbers are the same.
      lowering: "auto" computes each operation in the fastest form for each platform, "xla" by its
        plain definition in XLA's own operations everywhere. The numbers are the same up to
        rounding. "xla" suits platforms without tuned operations and exports that must stay simple,
        and also has forward-mode derivatives.
      jit_blocks: whether equal transformer blocks are traced only once, by `nn.jit`. Programs then
        compile faster, but dropout draws other random numbers, and `nn.tabulate` sees into the
        first block only.
      stochastic_depth: probability, in training, that what the last transformer block adds is left
        out for a sample; it falls linearly to 0 for the first block (Huang et al. 2016). Needs the
        rng "dropout".
    """

    config: UNETRConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    lowering: ops.Lowering = "auto"
    jit_blocks: bool = False
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool = False,
        mask: jax.Array | None = None,
        return_skips: bool = False,
        return_attention: bool = False,
    ) -> jax.Array | tuple[jax.Array | tuple[jax.Array, ...], ...]:
        """Segments a batch of volumes.

        Args:
          x: image [B, *img_size, in_channels]; any batch size.
          train: whether dropout is active (needs the rng "dropout" if dropout_rate > 0) and batch
            statistics are used and updated (needs mutable=["batch_stats"]).
          mask: which tokens each token may attend to: boolean, broadcastable to [B, heads, N, N].
          return_skips: whether to return the encoder's features as well.
          return_attention: whether to return the attention weights of every block as well.

        Returns:
          Logits [B, *img_size, out_channels]; with `return_skips` also the four features
          [B, N, hidden_size], in the order of `config.skip_layers`; with `return_attention` also
          `num_layers` arrays [B, heads, N queries, N keys], as they are before dropout.

        Raises:
          ValueError: if the input does not have the configured shape, or the mask is not boolean or
            not broadcastable.
        """
        cfg = self.config
        expected = (*cfg.img_size, cfg.in_channels)
        if x.ndim != len(expected) + 1 or x.shape[1:] != expected:
            raise ValueError(f"x: shape {x.shape}, must be (batch, {str(expected)[1:]}")
        if self.lowering not in get_args(ops.Lowering):
            allowed = " or ".join(map(repr, get_args(ops.Lowering)))
            raise ValueError(f"lowering={self.lowering!r}: must be {allowed}")
        fields = {**common_fields(self), "remat": self.remat}
        encoder = VisionTransformer(
            cfg,
            **fields,
            jit_blocks=self.jit_blocks,
            stochastic_depth=self.stochastic_depth,
            name="encoder",
        )
        skips, attention = encoder(x, mask, train=train, return_attention=return_attention)
        logits = Decoder(cfg, **fields, name="decoder")(x, skips, train=train)
        if not (return_skips or return_attention):
            return logits
        return logits, *([skips] * return_skips), *([attention] * return_attention)
