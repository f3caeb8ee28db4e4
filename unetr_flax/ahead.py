"""Compiling as a step of its own: a choice of programs, not of the library."""

import functools
import gc
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

from unetr_flax.malloc import return_freed_memory

P = ParamSpec("P")
R = TypeVar("R")


def compile_ahead(function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    """`function.lower(*args).compile()`, faster, and with the memory it took given back.

    Tracing makes a million objects, none of them garbage, which Python's collector would search
    again and again. Memory that is given back is soon had again, and cheaper than that which the
    process never had.

    Args:
      function: of `jax.jit`.
      *args: arrays, or their shapes and dtypes.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        compiled = function.lower(*args).compile()
    finally:
        if collecting:
            gc.enable()
    return_freed_memory()
    return compiled


def compiled_once(function: Callable[P, R]) -> Callable[P, R]:
    """A function of `jax.jit` that its first call compiles ahead, for arguments like those."""
    compiled = None

    @functools.wraps(function)
    def call(*args: P.args) -> R:
        nonlocal compiled
        if compiled is None:
            compiled = compile_ahead(function, *args)
        return compiled(*args)

    return call
