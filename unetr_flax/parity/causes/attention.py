"""Attention between the linear maps: softmax(q k^T scale) v."""

import einops
import torch

from unetr_flax.parity.causes.explain import Arrays, Cause, Definition
from unetr_flax.parity.causes.linear import QKV_ORDERS, ROLES


def attention(
    arrays: Arrays,
    *,
    scale: str,
    mask: str,
    order: str,
    right_order: str,
    roles: str = "qkv",
    join: str = "(h d)",
    scaled: str = "before the softmax",
    softmax: str = "keys",
    dropped: bool = False,
) -> torch.Tensor:
    """Computes attention of q, k and v [B, N, qkv, h, d] -> [B, N, (h d)].

    Args:
      arrays: qkv; mask [B, h, N, N] if there is one; "dropped", attention weights [B, h, N, N]
        after their dropout, where a model has recorded them.
      scale: "head" or "embedding" (the inverse root of that width), "none", or "head, no root".
      mask: "applied", "ignored", "inverted", or "multiplied" (weights times the mask).
      order: order of the features that q, k and v are taken from.
      right_order: the order in which they were split to `qkv`.
      roles: which of the three are queries, keys and values.
      join: order in which the heads are joined.
      scaled: "before the softmax" or "after the softmax".
      softmax: over "keys" or "queries".
      dropped: whether the recorded weights are used.
    """
    qkv = arrays["qkv"]
    heads, width = qkv.shape[-2:]
    if order != right_order:
        flat = einops.rearrange(qkv, f"b n qkv h d -> b n {right_order}")
        qkv = einops.rearrange(flat, f"b n {order} -> b n qkv h d", h=heads, qkv=3)
    query, key, value = (qkv[:, :, "qkv".index(role)] for role in roles)
    factor = {
        "head": width**-0.5,
        "embedding": (heads * width) ** -0.5,
        "none": 1.0,
        "head, no root": 1 / width,
        "twice": 1 / width**0.5 / (heads * width) ** 0.5,
    }[scale]
    energy = torch.einsum("bqhd,bkhd->bhqk", query, key)
    allowed = arrays.get("mask")
    if mask == "inverted":
        allowed = ~arrays["mask"].bool()
    if allowed is not None and mask in ("applied", "inverted"):
        energy = energy.masked_fill(~allowed.bool(), torch.finfo(energy.dtype).min)
    if scaled == "before the softmax":
        energy = energy * factor
    weights = energy.softmax(-1 if softmax == "keys" else -2)
    if scaled == "after the softmax":
        weights = weights * factor
    if mask == "multiplied":
        weights = weights * arrays["mask"]
    if dropped:
        weights = arrays["dropped"]
    out = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    return einops.rearrange(out, f"b n h d -> b n {join}")


ATTENTION = Definition(
    attention,
    (
        Cause("scale", "head", "attention scaled by the head's width"),
        Cause("scale", "embedding", "attention scaled by the embedding's width"),
        Cause("scale", "none", "attention not scaled"),
        Cause("scaled", "after the softmax", "attention scaled after the softmax"),
        Cause("scale", "head, no root", "attention divided by the head's width, without the root"),
        Cause("mask", "ignored", "mask ignored"),
        Cause("mask", "inverted", "mask inverted"),
        Cause("mask", "multiplied", "mask multiplied with the weights after the softmax"),
        *(Cause("order", order, f"q, k and v split as {order}") for order in QKV_ORDERS),
        *(Cause("roles", roles, f"{', '.join(roles)} taken for q, k, v") for roles in ROLES[1:]),
        Cause("join", "(d h)", "heads joined as (d h)"),
        Cause("softmax", "queries", "softmax over the queries instead of the keys"),
        Cause("dropped", True, "dropout active on the attention weights (training mode left on)"),
    ),
)
