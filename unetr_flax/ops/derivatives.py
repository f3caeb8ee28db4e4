"""Functions with written-out gradients, which have reverse-mode derivatives only."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

FORWARD_MODE = (
    "forward-mode differentiation (jvp, linearize, jacfwd) of a tuned operation: it has "
    'reverse-mode derivatives only; UNETR(cfg, lowering="xla") has both'
)


def custom_vjp(function: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> Any:
    """Makes a `jax.custom_vjp` whose error in forward mode names the way out.

    Args:
      function: function of pytrees.
      nondiff_argnums: positions of its static arguments.

    Returns:
      The function, with a method `defvjp` like that of `jax.custom_vjp`.
    """
    inner = jax.custom_vjp(function, nondiff_argnums=nondiff_argnums)

    def call(*args: Any) -> Any:
        return inner(*(a if i in nondiff_argnums else _guarded(a) for i, a in enumerate(args)))

    guarded: Any = functools.wraps(function)(call)
    guarded.defvjp = inner.defvjp
    return guarded


def _guarded(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: _guard.bind(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree
    )


def _refuse(*_: Any, **__: Any) -> Any:
    raise TypeError(FORWARD_MODE)


# `_guard` is the identity. Its tangents pass `_tangent`, which can be transposed but not computed.
# JAX would raise an error of its own for a custom VJP only later, and a less helpful one.
_guard = Primitive("reverse_mode_only")
_guard.def_impl(lambda x: x)
_guard.def_abstract_eval(lambda x: x)
mlir.register_lowering(_guard, lambda context, x: [x])
batching.defvectorized(_guard)

_tangent = Primitive("reverse_mode_only_tangent")
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda x: x)
mlir.register_lowering(_tangent, _refuse)
# A gradient is transposed before it is batched, so only forward mode batches a tangent.
batching.primitive_batchers[_tangent] = _refuse
ad.deflinear(_tangent, lambda cotangent: [cotangent])


def _guard_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    # The primal value stays unguarded, so that a derivative can be differentiated again.
    return x, tangent if isinstance(tangent, ad.Zero) else _tangent.bind(tangent)


ad.primitive_jvps[_guard] = _guard_jvp
