"""Modules whose activations the backward pass computes again (Chen et al. 2016)."""

import copy
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core import lift
from flax.linen.transforms import lift_transform

from unetr_flax import ops


def recomputed(
    function: Callable[..., Any], *, lowering: ops.Lowering = "auto"
) -> Callable[..., Any]:
    """Returns `function(module, x, *others)` such that only its operands are stored.

    This is `nn.remat` with the recomputation of `ops.recompute`. If x is the result of a norm, a
    deconvolution or a concatenation, the operands of that operation are stored instead. Arrays that
    `vmap` maps over must be among the operands, which are pytrees, and not of the closure.
    """

    def from_sources(module: nn.Module, sources: Any, *others: Any) -> Any:
        return function(module, ops.recomputed(sources), *others)

    def lifted(function):
        def inner(scope_fn, repack_fn, variables, rngs, *operands):
            counts: list[Any] = []

            def run(variables, rngs, *operands):
                scope = scope_fn(variables, rngs)
                _count_from_the_same(counts, scope)
                result = function(scope, *operands)
                return result, repack_fn(scope)

            return ops.recompute(run, lowering=lowering)(variables, rngs, *operands)

        return lift.pack(inner, (True,), (True,), (True,), name="remat")

    def call(module: nn.Module, x: jax.Array, *others: Any) -> Any:
        return lift_transform(lifted, from_sources)(module, ops.recompute_sources(x), *others)

    return call


def _count_from_the_same(counts: list[Any], scopes: Any) -> None:
    """Lets a module draw the random numbers again that it drew when it ran first.

    A key is made of the number of keys before it, which tracing a module again would go on from.

    Args:
      counts: the counts before the first run; empty before it.
      scopes: the scopes of the module.
    """
    leaves = jax.tree.leaves(scopes)
    if counts:
        for scope, count in zip(leaves, counts, strict=True):
            scope.rng_counters = copy.deepcopy(count)
    else:
        counts += [copy.deepcopy(scope.rng_counters) for scope in leaves]
