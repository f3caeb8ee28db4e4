"""Recomputation of activations in the backward pass (Chen et al. 2016)."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.features import without_moment_grads
from unetr_flax.ops.materialize import materialize
from unetr_flax.ops.platform import Lowering, by_platform


def recompute(run: Callable[..., Any], *, lowering: Lowering = "auto") -> Callable[..., Any]:
    """Returns `run` such that only its arguments are stored for the backward pass.

    With "xla" this is `jax.checkpoint`. But XLA:CPU drops the barriers that separate the second
    computation from the first, runs it early, and so needs more memory than without recomputation.
    With "auto" the second computation depends on the gradient, and so cannot run before it.

    Args:
      run: function of pytrees.
      lowering: "auto" or "xla", see `platform.Lowering`.
    """
    if lowering == "xla":
        return jax.checkpoint(run)
    rerun = custom_vjp(run)

    def forward(*operands):
        # Operations choose what to materialize for a backward pass only when differentiated.
        return jax.vjp(run, *operands)[0], operands

    def backward(operands, cotangents):
        leaves, structure = jax.tree.flatten(operands)
        tied = by_platform(leaves, cotangents, cpu=_tied_on_cpu, default=_tied_by_barrier)
        _, vjp = jax.vjp(run, *jax.tree.unflatten(structure, tied))
        return without_moment_grads(vjp(cotangents))

    rerun.defvjp(forward, backward)
    return rerun


def _tied_by_barrier(leaves, cotangents):
    return lax.optimization_barrier((leaves, cotangents))[0]


def _tied_on_cpu(leaves, cotangents):
    """Returns the leaves, with copies that depend on the cotangents for all but the largest.

    The largest leaf need not be copied, since every operation reads some of the others as well.
    """
    largest = max(leaves, key=_volume)
    others = [leaf for leaf in leaves if leaf is not largest and _is_float(leaf)]
    grad = max(jax.tree.leaves(cotangents), key=_volume)
    width = math.prod(grad.shape[1:])
    witness = grad.reshape(grad.shape[0], width)[:, 0].sum(keepdims=True)
    tied = iter(materialize(lambda *others: others, witness, *others))
    return [next(tied) if leaf is not largest and _is_float(leaf) else leaf for leaf in leaves]


def _volume(leaf: jax.Array) -> int:
    return leaf.size


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
