"""Recomputation of activations in the backward pass (Chen et al. 2016)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import lift
from flax.linen.transforms import lift_transform
from jax import lax

from unetr_flax.ops.materialize import materialize
from unetr_flax.ops.platform import by_platform


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(module, *arguments)`, of which only the arguments are kept for the backward pass.

    It does what `nn.remat` does, but on CPU too. There XLA drops the barriers that part the second
    computation of `nn.remat` from the first, does it early, and so needs more memory than without.
    Here the second computation depends on the gradient.
    """
    return lift_transform(_lifted, function)


def _lifted(function):
    def inner(scope_fn, repack_fn, variables, rngs, *arguments):
        def run(variables, rngs, arguments):
            scope = scope_fn(variables, rngs)
            result = function(scope, *arguments)
            return result, repack_fn(scope)

        return _recomputed(run)(variables, rngs, arguments)

    return lift.pack(inner, (True,), (True,), (True,), name="remat")


def _recomputed(run):
    rerun = jax.custom_vjp(run)

    def forward(*operands):
        return run(*operands), operands

    def backward(operands, cotangents):
        leaves, structure = jax.tree.flatten(operands)
        tied = by_platform(leaves, cotangents, cpu=_tied_on_cpu, default=_tied_by_barrier)
        _, vjp = jax.vjp(run, *jax.tree.unflatten(structure, tied))
        return vjp(cotangents)

    rerun.defvjp(forward, backward)
    return rerun


def _tied_by_barrier(leaves, cotangents):
    return lax.optimization_barrier((leaves, cotangents))[0]


def _tied_on_cpu(leaves, cotangents):
    """The leaves, some of which are known only when the cotangents are.

    Those are copied: all but the largest, as every operation needs some of them.
    """
    largest = max(leaves, key=lambda leaf: leaf.size)
    others = [leaf for leaf in leaves if leaf is not largest and _is_float(leaf)]
    grad = max(jax.tree.leaves(cotangents), key=lambda leaf: leaf.size)
    witness = grad.reshape(grad.shape[0], -1)[:, 0].sum(keepdims=True)
    tied = iter(materialize(lambda *others: others, witness, *others))
    return [next(tied) if leaf is not largest and _is_float(leaf) else leaf for leaf in leaves]


def _is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)
