"""Compiling as a step of its own: a choice of programs, not of the library."""

import functools
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import jax

from unetr_flax.runtime.malloc import return_freed_memory

P = ParamSpec("P")
R = TypeVar("R")


def aot_compile(function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
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


def compile_in_background(function: Callable[P, R], *args: Any) -> Callable[P, R]:
    """A function of `jax.jit` for arguments like those, which is compiled while others work.

    A call waits until that is done, and raises what went wrong. Settings of JAX that hold in this
    thread only, by a context manager, do not hold there.

    Args:
      function: of `jax.jit`.
      *args: arrays, or their shapes, dtypes and shardings.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
    compiled = pool.submit(aot_compile, function, *args)
    pool.shutdown(wait=False)

    @functools.wraps(function)
    def call(*args: P.args) -> R:
        return compiled.result()(*args)

    return call
