"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1).

Shapes: B batch, N tokens, H heads, D head size.
"""

import types
from typing import Any

import jax

from unetr_flax.ops import sharding as sharded
from unetr_flax.ops.attention import cpu, cudnn, xla
from unetr_flax.ops.platform import Lowering


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float,
    lowering: Lowering = "auto",
) -> jax.Array:
    """Computes softmax(query key^T scale) value.

    With "auto", cuDNN computes attention in bfloat16 or float16 if all CUDA devices of the process
    support it and there is no mask (cuDNN would add a mask as a bias, whose gradient is as large as
    the weights). That form has reverse-mode derivatives only. `jax.export` refuses cuDNN's kernels,
    since it cannot promise that later versions run them: trace within `ops.exportable()`.

    With "auto", many keys and no mask, CPUs compute it in blocks, whose weights are never all in
    memory. That form, too, has reverse-mode derivatives only.

    Args:
      query: [B, N, H, D].
      key: [B, N, H, D].
      value: [B, N, H, D].
      mask: boolean, broadcastable to [B, H, N queries, N keys]; True where a query may look.
      scale: factor on the products, before the softmax.
      lowering: "auto" or "xla", see `platform.Lowering`.

    Returns:
      [B, N, H, D].
    """
    tuned = _tuned(query, key, mask, lowering)
    if tuned is not None:
        return tuned.dot_product_attention(query, key, value, scale)
    return xla.dot_product_attention(query, key, value, mask, scale=scale)


def attention_is_plain(
    query: Any, key: Any, mask: Any = None, *, lowering: Lowering = "auto"
) -> bool:
    """Tells whether `dot_product_attention` of such arrays makes all weights and applies them.

    The arrays' shapes and dtypes, as `jax.ShapeDtypeStruct`, are enough.
    """
    return _tuned(query, key, mask, lowering) is None


def _tuned(query: Any, key: Any, mask: Any, lowering: Lowering) -> types.ModuleType | None:
    """Returns the module of the tuned form that fits the arguments, if one does."""
    if lowering == "auto" and mask is None and sharded.active() is None:
        if cudnn.is_available(query):
            return cudnn
        if cpu.is_available(query, key):
            return cpu
    return None
