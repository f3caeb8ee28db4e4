"""Compiling a jitted function ahead of its first call, in the foreground or in the background."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from unetr_flax.runtime.garbage import collector_paused
from unetr_flax.runtime.malloc import return_freed_memory

R = TypeVar("R")


def aot_compile(function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    """Does `function.lower(*args).compile()` faster, and returns the memory used on the way.

    The garbage collector is off meanwhile, see `garbage.collector_paused`. Afterwards freed memory
    goes back to the kernel: getting some of it again is cheap.

    Args:
      function: a function of `jax.jit`.
      *args: its arguments, as arrays or as their shapes and dtypes.

    Returns:
      The compiled program, which takes arrays of these shapes and dtypes only.
    """
    with collector_paused():
        compiled = function.lower(*args).compile()
    return_freed_memory()
    return compiled


def compile_in_background(
    function: Callable[..., R],
    *args: Any,
    check: Callable[[jax.stages.Compiled], None] = lambda compiled: None,
) -> Callable[..., R]:
    """Starts to compile a jitted function and returns one that calls the compiled program.

    A call of the result waits until compiling is done and raises the error that compiling or
    `check` raised.
    Settings of JAX that a context manager makes for this thread do not hold in the background.

    Args:
      function: a function of `jax.jit`.
      *args: its arguments, as arrays or as their shapes, dtypes and shardings.
      check: called with the compiled program in the background, before its first call.
    """

    def compile_and_check() -> jax.stages.Compiled:
        program = aot_compile(function, *args)
        check(program)
        return program

    pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
    compiled = pool.submit(compile_and_check)
    pool.shutdown(wait=False)

    @functools.wraps(function)
    def call(*args: Any) -> R:
        return compiled.result()(*args)

    return call
